"""Print the two tables of a results folder as Markdown, with targets and results.

python benchmarks/layers/summarize.py benchmarks/layers/results/2026-11-24-cpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LAYER_COLUMNS = (
    "factored", "merged", "two-branch", "adapted auto", "two layers", "peft lora", "tensorly-torch"
)  # fmt: skip


def conditions(found: dict[str, Any]) -> str:
    """One line on where and when."""
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    load = " ".join(found["load"])
    place = f"{found['hardware']}, {found['date']} UTC, load {load}, commit {found['commit']}"
    return f"{place}; {versions}"


def layers(data: dict[str, Any]) -> list[str]:
    """Speed against full rank, layer by layer."""
    n = data["rows"][0]["ms"]["full-rank"]["n"]
    lines = [f"Layers ({conditions(data['conditions'])}; medians, n = {n}).", ""]
    head = ["layer", "r", "FLOPs", "roofline", *LAYER_COLUMNS, "spread of full-rank"]
    lines += ["| " + " | ".join(head) + " |", "|---|--:|" + "--:|" * (len(head) - 2)]
    for row in data["rows"]:
        full = row["ms"]["full-rank"]
        roof = row["roofline_ms"]["full-rank"] / row["roofline_ms"]["factored"]
        speeds = [f"{full['median'] / row['ms'][c]['median']:.2f}" for c in LAYER_COLUMNS]
        spread = f"{full['low']:.1f}-{full['high']:.1f} ms"
        cells = [
            row["layer"],
            row["share"],
            f"{row['flop_ratio']:.2f}",
            f"{roof:.2f}",
            *speeds,
            spread,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def models(data: dict[str, Any]) -> list[str]:
    """Speed against full rank, model by model."""
    n = data["rows"][0]["ms"]["full-rank"]["n"]
    lines = [f"Models ({conditions(data['conditions'])}; medians [quartiles], n = {n}).", ""]
    head = ["model", "FLOPs", "low-rank", "where faster", "two layers", "full-rank, ms", "aimed at"]
    lines += ["| " + " | ".join(head) + " |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for row in data["rows"]:
        full, speed = row["ms"]["full-rank"], row["speedup"]
        cells = [
            row["model"],
            f"{row['flop_ratio']['low-rank']:.2f}",
            *(f"{speed[k]:.2f}" for k in ("low-rank", "low-rank where faster", "two layers")),
            f"{full['median']:.0f} [{full['low']:.0f}-{full['high']:.0f}]",
            f"{row['target']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(folder: Path) -> None:
    """Print both tables."""
    for name, table in (("models.json", models), ("layers.json", layers)):
        if (folder / name).is_file():
            print("\n".join(table(json.loads((folder / name).read_text()))), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
