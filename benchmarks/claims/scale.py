"""Many GPUs: the cost model's tables and what is said about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.scale.tables import FORMS, GPUS, found, tables
from dynarank.cost.scale import Cluster

from .records import read_json

PAGE = "docs/scale.md"
RESULTS = "scale/results/2026-11-29"
TOKENS, VOCABULARY, BF16 = 4096, 32_000, 2
WIDTHS = {"7B": 4096, "70B": 8192}
SETTINGS = ("Llama-2 shapes", "one sequence of 4,096 tokens", "of each block 4,096 tokens keep")


def claims() -> Iterator[str]:
    """Yield the assumptions, the tables and the sentences."""
    yield from assumptions(Cluster())
    yield from activations()
    data = read_json(f"{RESULTS}/llama.json")
    for phases in data.values():
        for head, _, *rows in tables(phases):
            yield from (head, *rows)
    yield from sentences(data["7B"])


def assumptions(cluster: Cluster) -> Iterator[str]:
    """Yield the rates that seconds are computed from, and the one that was measured."""
    yield (
        f"{cluster.per_node} GPUs a machine: {cluster.node_bandwidth / 1e9:.0f} GB/s between GPUs, "
        f"{cluster.network_bandwidth / 1e9:.0f} GB/s a GPU between machines, "
        f"{cluster.utilization:.0%} of {cluster.peak_flops / 1e12:.0f} TFLOP/s"
    )
    yield f"decompositions at {cluster.decomposition_flops / 1e12:.1f} TFLOP/s."
    rates = [row["flops_per_second"] / 1e12 for row in read_json(f"{RESULTS}/decompositions.json")]
    low, high = (f"{rate:.2f}".removeprefix("0") for rate in (min(rates), max(rates)))
    yield f"One core of an AMD EPYC reached {low} to {high} TFLOP/s"


def activations() -> Iterator[str]:
    """Yield what the inputs of the blocks and the logits of one sequence take."""
    small, large = (f"{TOKENS * width * BF16 / 1e6:.0f} MB" for width in WIDTHS.values())
    yield f"{small} a block at 7B and {large} at 70B in bf16"
    yield f"logits {TOKENS * VOCABULARY * BF16 / 1e9:.2f} GB"


def sentences(phases: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what the text says of 7B."""
    full, half = (
        found(phases, layout="DDP", form=form)["memory"]["total"] / 1e9 for form in FORMS[:2]
    )
    yield f"At half the parameters 7B takes {half:.0f} GB with DDP and AdamW before activations"
    yield f"at full rank {full:.0f} GB."
    moves = {
        gpus: found(phases, layout="FSDP2", gpus=gpus, before=FORMS[0], form=FORMS[1])["transition"]
        for gpus in GPUS
    }
    few, many = moves[8]["rounds"], moves[256]["rounds"]
    yield f"7B has {moves[8]['layers']} layers to decompose: {few} rounds on 8 GPUs"
    yield f"rounds on 8 GPUs, {'one' if many == 1 else many} on 256."
