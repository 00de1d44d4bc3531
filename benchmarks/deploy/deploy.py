"""Latency and size of a network at full rank, merged and factored, as plain modules and in ONNX.

    python benchmarks/deploy/deploy.py --out benchmarks/deploy/results/2026-11-29-cpu

Evaluation, one thread, fp32; within a row of the table all candidates are interleaved, and times
are medians of process time with quartiles. Merged is a low-rank network multiplied out: it should
cost what full rank costs. A minute and a half.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank.export.onnx import to_onnx
from dynarank.export.program import to_pt2

sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))
from timing import interleaved, spread, write

SHARE, SEED, ROUNDS = 0.25, 0, 15
LEAST = 2e-3  # seconds that one timing takes at least
BATCHES = (1, 64)
ENGINES = ("eager", "torch.export", "onnxruntime")


class Block(nn.Module):
    """A transformer block of linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        y = self.norms[0](x)
        parts = (layer(y) for layer in (self.query, self.key, self.value))
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def mlp() -> nn.Module:
    """Three wide layers."""
    layers = [nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def narrow() -> nn.Module:
    """Layers so small that calling them costs as much as their products."""
    layers = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(96, 10))


def convnet() -> nn.Module:
    """Four 3x3 convolutions on images of 16x16."""
    sizes = (3, 64, 128, 128, 256)
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, stride=1 + i % 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def encoder() -> nn.Module:
    """Three transformer blocks of width 256."""
    return nn.Sequential(*(Block(256, 4) for _ in range(3)), nn.Linear(256, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide MLP": (mlp, (784,)),
    "narrow MLP": (narrow, (64,)),
    "ConvNet": (convnet, (3, 16, 16)),
    "encoder, 32 tokens": (encoder, (32, 256)),
}


def candidates(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """The network at full rank, merged, and with its factors."""
    torch.manual_seed(SEED)
    full = make().eval()
    ranked = dr.factorize(copy.deepcopy(full), SHARE)
    return {
        "full": full,
        "merged": dr.to_plain(ranked, keep="merged"),
        "factored": dr.to_plain(ranked),
    }


def engines(model: nn.Module, example: Tensor, folder: Path) -> Iterator[tuple[str, Any, int]]:
    """What runs the model, and the bytes of its file."""
    import onnxruntime as ort

    state = folder / "state.pt"
    torch.save(model.state_dict(), state)
    yield "eager", model, state.stat().st_size
    program = to_pt2(model, example, folder / "model.pt2")
    yield "torch.export", torch.export.load(program.path).module(), program.size
    made, options = to_onnx(model, example, folder / "model.onnx"), ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(made.path), options)
    (name,) = (one.name for one in session.get_inputs())
    yield "onnxruntime", lambda x: session.run(None, {name: x.numpy()}), made.size


def repeated(run: Callable[[Tensor], object], x: Tensor) -> tuple[Callable[[], None], int]:
    """A step long enough to be timed, and how often it runs."""
    run(x)
    begun = time.perf_counter()
    run(x)
    times = max(1, round(LEAST / max(time.perf_counter() - begun, 1e-6)))

    def step() -> None:
        with torch.inference_mode():
            for _ in range(times):
                run(x)

    return step, times


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each network, batch size, engine and candidate."""
    for name, (make, shape) in NETWORKS.items():
        example = torch.randn(2, *shape)
        found: dict[tuple[str, str], tuple[Any, int, int]] = {}
        for kind, model in candidates(make).items():
            count = sum(p.numel() for p in model.parameters())
            folder = Path(tempfile.mkdtemp())
            for engine, run, size in engines(model, example, folder):
                found[engine, kind] = run, size, count
        for batch in BATCHES:
            x = torch.randn(batch, *shape)
            steps = {key: repeated(run, x) for key, (run, _, _) in found.items()}
            seconds = interleaved({str(k): s for k, (s, _) in steps.items()}, rounds)
            for (engine, kind), (_, size, count) in found.items():
                each = [s / steps[engine, kind][1] for s in seconds[str((engine, kind))]]
                yield {
                    "network": name, "batch": batch, "engine": engine, "kind": kind,
                    "parameters": count, "bytes": size, "ms": spread(each),
                }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Milliseconds (quartiles), and sizes, as Markdown."""
    by = {(r["network"], r["batch"], r["engine"], r["kind"]): r for r in found}
    lines = [
        "| network | batch | engine | full, ms | merged, ms | factored, ms | factored / merged "
        "| merged, MB | factored, MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in NETWORKS:
        for batch in BATCHES:
            for engine in ENGINES:
                one = {k: by[name, batch, engine, k] for k in ("full", "merged", "factored")}
                times = (
                    f"{r['ms']['median']:.3g} ({r['ms']['low']:.3g}-{r['ms']['high']:.3g})"
                    for r in one.values()
                )
                ratio = one["factored"]["ms"]["median"] / one["merged"]["ms"]["median"]
                sizes = (f"{one[k]['bytes'] / 1e6:.2f}" for k in ("merged", "factored"))
                cells = [name, str(batch), engine, *times, f"{ratio:.2f}", *sizes]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(out: Path, rounds: int) -> None:
    """Time everything, write the rows and the table."""
    torch.set_num_threads(1)
    found = list(rows(rounds))
    write(out / "deploy.json", found, packages=("onnx", "onnxruntime"))
    print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timings of each candidate")
    arguments = parser.parse_args()
    main(arguments.out, arguments.rounds)
