"""Speed of single layers: full-rank, factored and adapted, with the roofline and other libraries.

    python benchmarks/layers/layers.py --out benchmarks/layers/results/2026-11-24-cpu/layers.json

Forward and backward pass, one thread, fp32, candidates interleaved, medians of process time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import lora, pair, tensorly_layer
from roofline import Roofline, machine_roofline
from timing import interleaved, keep_memory, layer_step, spread, write
from torch import nn

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.forms import Form
from dynarank.layers import WeightSpec

LINEAR = [(d, d, rows) for d in (256, 512, 1024, 2048) for rows in (512, 2048)]
LINEAR += [(1024, 4096, 2048), (384, 1536, 2048)]
CONV = [(16, 32, 32), (32, 16, 32), (64, 32, 32), (128, 16, 32), (256, 8, 32), (160, 32, 8)]
SHARES = (8, 4, 2)


def cases(small: bool) -> Iterator[tuple[str, nn.Linear | nn.Conv2d, torch.Size]]:
    """Name, plain layer and input shape."""
    for inputs, outputs, rows in LINEAR[:3] if small else LINEAR:
        name = f"linear {inputs}->{outputs}, {rows} rows"
        yield name, nn.Linear(inputs, outputs), torch.Size((rows, inputs))
    for channels, size, batch in CONV[:1] if small else CONV:
        name = f"conv 3x3, {channels} channels, {size}x{size}, batch {batch}"
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        yield name, layer, torch.Size((batch, channels, size, size))


def ours(layer: nn.Module, form: Form) -> nn.Module:
    """A copy of the layer in a form, its adapter not zero."""
    changed = copy.deepcopy(layer)
    dr.apply_plan(changed, {"": form})
    for name, p in changed.named_parameters():
        if name == "up":
            nn.init.normal_(p, std=0.02)
    return changed


def candidates(layer: nn.Linear | nn.Conv2d, rank: int) -> dict[str, nn.Module]:
    """The layer in every form, and as others build it."""
    return {
        "full-rank": copy.deepcopy(layer),
        "factored": ours(layer, LowRank(rank, execution="factored")),
        "merged": ours(layer, Adapted(rank, execution="merged")),
        "two-branch": ours(layer, Adapted(rank, execution="two-branch")),
        "adapted auto": ours(layer, Adapted(rank)),
        "two layers": pair(layer, rank),
        "peft lora": lora(copy.deepcopy(layer), rank),
        "tensorly-torch": tensorly_layer(copy.deepcopy(layer), rank),
    }


def predict(layer: nn.Module, shape: torch.Size, rank: int, roof: Roofline) -> tuple[float, float]:
    """Roofline milliseconds at full rank and factored."""
    (site,) = dr.survey(layer)
    spec: WeightSpec = site.spec
    form = spec.resolve(LowRank(rank))
    assert isinstance(form, LowRank)
    full = roof.chain(shape, [spec.shape], [spec.geometry])
    low = roof.chain(shape, spec.factor_shapes(form), spec.stages(form, spec.geometry))
    return full * 1e3, low * 1e3


def row(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    shape: torch.Size,
    share: int,
    rounds: int,
    roof: Roofline,
) -> dict[str, Any]:
    """One line of the table."""
    n, m = layer.weight.shape[0], layer.weight[0].numel()
    rank = max(1, min(n, m) // share)
    x = torch.randn(shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
    x.requires_grad_()
    layers = candidates(layer, rank)
    found = interleaved({k: layer_step(v, x) for k, v in layers.items()}, rounds)
    full, low = predict(layer, shape, rank, roof)
    return {
        "layer": name,
        "rank": rank,
        "share": f"1/{share}",
        "flop_ratio": m * n / (rank * (m + n)),
        "roofline_ms": {"full-rank": full, "factored": low},
        "ms": {k: spread(v) for k, v in found.items()},
    }


def main() -> None:
    """Run the table and write it."""
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a few small layers only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    roof = machine_roofline()
    rows: list[dict[str, Any]] = []
    for name, layer, shape in cases(options.small):
        for share in SHARES:
            rows.append(row(name, layer, shape, share, options.rounds, roof))
            ms = {k: v["median"] for k, v in rows[-1]["ms"].items()}
            shown = "  ".join(f"{k} {ms['full-rank'] / v:.2f}x" for k, v in ms.items())
            print(
                f"{name}, r = 1/{share} (FLOPs {rows[-1]['flop_ratio']:.2f}x): {shown}", flush=True
            )
    write(options.out, rows)


if __name__ == "__main__":
    main()
