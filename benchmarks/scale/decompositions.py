"""FLOPs a second of the SVD of a weight on one CPU core, by the count of ``decomposition_flops``.

    python -m benchmarks.scale.decompositions --out benchmarks/scale/results/2026-11-29

Median process time of the cut to half of the weight's parameters, fp32, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dynarank.cost.scale import decomposition_flops
from dynarank.decompositions import get_decomposition
from dynarank.forms import FullRank, LowRank
from dynarank.layers import WeightSpec

SHAPES = ((512, 512), (1024, 1024), (1024, 2816), (2048, 2048), (2048, 5504))
ROUNDS = 3


def measured(shape: tuple[int, int]) -> dict[str, object]:
    """One weight's row."""
    torch.manual_seed(0)
    spec, weight, seconds = WeightSpec("weight", shape), torch.randn(shape), list[float]()
    form = spec.resolve(LowRank(0.5))
    assert isinstance(form, LowRank)
    for _ in range(ROUNDS):
        begun = time.process_time()
        get_decomposition("svd").split(weight, form.resolved_rank)
        seconds.append(time.process_time() - begun)
    flops, median = decomposition_flops(spec, FullRank(), form), statistics.median(seconds)
    return {"shape": shape, "rank": form.rank, "flops": flops, "seconds": seconds,
            "flops_per_second": flops / median}  # fmt: skip


def main() -> None:
    """Write and print the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    rows = [measured(shape) for shape in SHAPES]
    for row in rows:
        print(row["shape"], f"{row['flops_per_second']:.3g} FLOPs a second")
    out.mkdir(parents=True, exist_ok=True)
    (out / "decompositions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
