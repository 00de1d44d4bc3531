"""Choose a rank: a sentence encoder cut to several ranks."""

from __future__ import annotations

from collections.abc import Iterator

from .records import only, read_json

PAGE = "docs/how-to/choose-a-rank.md"
RESULT = "compression/results/2026-11-28-sentence-encoder/result.json"
SETTINGS = ("within 1% of full rank's loss", "(try 3x)", "the 36 block layers")
FP32 = 4  # bytes
CUTS = ("plain", "calibrated", "calibrated, in a budget")


def claims() -> Iterator[str]:
    """Yield the table and what stands above it."""
    rows = read_json(RESULT)["rows"]
    full = only(rows, variant="full rank")
    yield f"a sentence encoder of {full['megabytes'] / FP32:.1f}M parameters"
    yield f"full rank {full['spearman']:.4f}):"
    for share in (0.5, 0.375, 0.25):
        cut = [only(rows, variant=f"{share} {name}") for name in CUTS]
        scores = " | ".join(f"{one['spearman']:.4f}" for one in cut)
        yield f"| {share} | {cut[0]['forward_flops']:.2f}x | {scores} |"
