"""Speed of decomposing WRN-28-10 and GPT-2 small, compared with a loop over torch.linalg.svd.

    python benchmarks/decompositions/bench.py --out benchmarks/decompositions/results/2026-11-24

One process for each number of threads. Each matrix, as (out, in * positions), is decomposed at rank
min(n, m) / 4 by ``torch.linalg.svd(W, full_matrices=False)``, by ``SVD().split`` without a start
(cold) and from the factors of W before it changed by 1% (warm), interleaved; the time of a model is
the sum of its matrices' medians (of CPU time for one thread, else of wall time). The error is
||W - up down|| over the smallest possible, in fp64. Spectra: as initialized, and i^-0.5 and i^-1 as
after training. Also measured: the share of training time that a spectral monitor takes at its
default interval, on a 3072-1024-1024-10 MLP with batches of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from dynarank import SpectralMonitor
from dynarank.decompositions.svd import SVD

Shape = tuple[int, int]
WRN_28_10: dict[Shape, int] = {
    (16, 27): 1, (160, 144): 1, (160, 16): 1, (160, 1440): 7, (320, 1440): 1, (320, 160): 1,
    (320, 2880): 7, (640, 2880): 1, (640, 320): 1, (640, 5760): 7, (100, 640): 1,
}  # fmt: skip
GPT2 = {(2304, 768): 12, (768, 768): 12, (3072, 768): 12, (768, 3072): 12}  # (out, in)
GPT2_AS_STORED = {(768, 2304): 12, (768, 768): 12, (768, 3072): 12, (3072, 768): 12}  # (in, out)
MODELS: dict[str, dict[Shape, int]] = {
    "WRN-28-10": WRN_28_10,
    "GPT-2 small, (out, in)": GPT2,
    "GPT-2 small, as stored (in, out)": GPT2_AS_STORED,
    "GPT-2 small, (out, in), with embeddings": {**GPT2, (50257, 768): 1, (1024, 768): 1},
}
SPECTRA = {"initial": 0.0, "i^-0.5": 0.5, "i^-1": 1.0}
DRIFT = 0.01


def matrix(shape: Shape, power: float) -> Tensor:
    """A (n, m) matrix with singular values i^-power, or a normal one."""
    generator = torch.Generator().manual_seed(0)
    if power == 0:
        return torch.randn(shape, generator=generator)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(s, k, generator=generator))[0] for s in shape)
    return (left * torch.arange(1, k + 1).float() ** -power) @ right.T


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds that a call takes."""
    began = clock()
    function()
    return clock() - began


def measure(shape: Shape, power: float, repeats: int) -> dict[str, float]:
    """Medians in milliseconds and errors over the optimum of one matrix."""
    svd, rank = SVD(), min(shape) // 4
    before = matrix(shape, power)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight = before + noise * (DRIFT * before.norm() / noise.norm())
    start = svd.split(before, rank)
    ways: dict[str, Callable[[], object]] = {
        "naive": lambda: torch.linalg.svd(weight, full_matrices=False),
        "cold": lambda: svd.split(weight, rank),
        "warm": lambda: svd.split(weight, rank, start),
    }
    for name in ("cold", "warm"):
        ways[name]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    # CPU time for one thread: other processes on the machine disturb it less.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(timed(way, clock))
    result = {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
    exact = weight.double() if shape[0] <= shape[1] else weight.double().T
    tail = torch.linalg.eigvalsh(exact @ exact.T).flip(0)[rank:].clamp(min=0).sum().sqrt()
    for name, factors in [
        ("cold", svd.split(weight, rank)),
        ("warm", svd.split(weight, rank, start)),
    ]:
        down, up = (factor.double() for factor in factors)
        result[f"{name}_error"] = ((weight.double() - up @ down).norm() / tail).item()
    return result


def compare(repeats: int, spectra: list[str]) -> list[dict[str, object]]:
    """A row for each model and spectrum."""
    rows: list[dict[str, object]] = []
    for spectrum in spectra:
        power = SPECTRA[spectrum]
        models = {
            m: c
            for m, c in MODELS.items()
            if (power == 0 and len(spectra) == 3) or "embeddings" not in m
        }
        shapes = {shape for counts in models.values() for shape in counts}
        by_shape = {shape: measure(shape, power, repeats) for shape in sorted(shapes)}
        for model, counts in models.items():
            total = {
                way: sum(n * by_shape[shape][f"{way}_ms"] for shape, n in counts.items())
                for way in ("naive", "cold", "warm")
            }
            rows.append(
                {
                    "model": model,
                    "spectrum": spectrum,
                    **{f"{way}_s": ms / 1e3 for way, ms in total.items()},
                    "cold_speedup": total["naive"] / total["cold"],
                    "warm_speedup": total["naive"] / total["warm"],
                    "cold_error": max(by_shape[shape]["cold_error"] for shape in counts),
                    "warm_error": max(by_shape[shape]["warm_error"] for shape in counts),
                    "matrices": {f"{a}x{b}": by_shape[a, b] for a, b in counts},
                }
            )
    return rows


def monitor_share(seconds: float) -> dict[str, float]:
    """What a monitor costs at its default interval, in a training run of this length."""
    torch.manual_seed(0)
    sizes = [3072, 1024, 1024, 10]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(128, 3072), torch.randint(10, (128,))
    monitor = SpectralMonitor(model)

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    train()
    steps, watching, readings, shares = [], 0.0, 0, [0.0]
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        steps.append(timed(train))
        before = time.perf_counter()
        readings += monitor.step() is not None
        watching += time.perf_counter() - before
        if time.perf_counter() - began > 10:
            shares.append(watching / (time.perf_counter() - began))
    one = statistics.median(timed(monitor.read) for _ in range(5))
    return {
        "seconds": time.perf_counter() - began,
        "steps": len(steps),
        "step_ms": 1e3 * statistics.median(steps),
        "reading_ms": 1e3 * one,
        "reading_in_steps": one / statistics.median(steps),
        "readings": readings,
        "share": shares[-1],
        "largest_share_after_10_s": max(shares),
    }


def machine() -> dict[str, object]:
    """What it runs on."""
    names = [x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(results: list[dict]) -> str:
    """The results as a page."""
    first = results[0]["machine"]
    lines = [
        "# Decompositions and spectra",
        "",
        f"{first['cpu']}, {first['cores']} cores, torch {first['torch']}, "
        f"Python {first['python']}, {first['date']}. fp32, rank min(n, m) / 4; medians of "
        f"{results[0]['repeats']} interleaved runs; seconds for the whole model. Error: the worst "
        "of its matrices, over the optimum.",
        "",
        "| threads | model | spectrum | svd loop s | cold s | warm s | cold x | warm x "
        "| cold error | warm error |",
        "|--|--|--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for row in result["models"]:
            lines.append(
                f"| {result['threads']} | {row['model']} | {row['spectrum']} "
                f"| {row['naive_s']:.2f} | {row['cold_s']:.2f} | {row['warm_s']:.2f} "
                f"| {row['cold_speedup']:.1f} | {row['warm_speedup']:.1f} "
                f"| {row['cold_error']:.5f} | {row['warm_error']:.5f} |"
            )
    lines += [
        "",
        "A spectral monitor at its default interval, 3072-1024-1024-10 MLP, batch 128:",
        "",
    ]
    lines += [
        "| threads | run s | step ms | one reading, in steps | readings | share | worst share |"
    ]
    lines += ["|--|--:|--:|--:|--:|--:|--:|"]
    for result in results:
        m = result["monitor"]
        lines.append(
            f"| {result['threads']} | {m['seconds']:.0f} | {m['step_ms']:.1f} "
            f"| {m['reading_in_steps']:.1f} | {m['readings']} | {m['share']:.2%} "
            f"| {m['largest_share_after_10_s']:.2%} |"
        )
    loads = ", ".join(f"{r['machine']['load'][0]:.1f}" for r in results)
    lines += ["", f"Load of the (shared) machine at the end of each process: {loads}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run each number of threads in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, help="only this number, in this process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--seconds", type=float, default=60.0, help="of training with a monitor")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
        result = {
            "threads": args.threads,
            "repeats": args.repeats,
            "models": compare(args.repeats, args.spectra),
            "monitor": monitor_share(args.seconds),
            "machine": machine(),
        }
        (args.out / f"threads-{args.threads}.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    for threads in (1, 2):
        options = [f"--threads={threads}", f"--repeats={args.repeats}", f"--seconds={args.seconds}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        options += ["--spectra", *args.spectra]
        command = [sys.executable, __file__, "--out", str(args.out), *options]
        subprocess.run(command, check=True, env=environment)
    results = [json.loads(p.read_text()) for p in sorted(args.out.glob("threads-*.json"))]
    (args.out / "README.md").write_text(table(results))


if __name__ == "__main__":
    main()
