"""Spectra of weights in blocks are those of the whole weights, in little memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from stored import random
from torch import Tensor
from warm_python import run as python

from dynarank.decompositions import UnfitWeightError
from dynarank.monitors import large_weights
from dynarank.monitors.large_weights import large_singular_values
from dynarank.monitors.singular_values import effective_rank, energy_rank, stable_rank

CPU = torch.device("cpu")
SHAPES = {
    "tall": (90, 7),
    "wide": (7, 90),
    "square": (40, 40),
    "one": (1, 50),
    "conv": (12, 5, 3, 3),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_give_the_values_of_the_whole(shape: str, dtype: torch.dtype, turned: bool) -> None:
    weight = random(*SHAPES[shape]).to(dtype)
    weight = weight.transpose(0, 1) if turned else weight
    expected = torch.linalg.svdvals(weight.double().flatten(1))
    for block in (1, 50, 1 << 20):
        values = large_singular_values(lambda: weight, CPU, 1 << 40, block)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-7 * float(expected[0]))


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_values_whose_squares_overflow_or_vanish(scale: float) -> None:
    weight = random(60, 8)
    values = large_singular_values(lambda: weight * scale, CPU, 1 << 40, 10)
    expected = torch.linalg.svdvals((weight * scale).double())
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 * float(expected[0]))


def spectrum(power: float, count: int = 200) -> Tensor:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(count, count).double())[0] for _ in range(2))
    values = torch.arange(1, count + 1).double() ** power
    return ((left * values) @ right).float()


@pytest.mark.parametrize("power", [0.0, -0.5, -1.0, -2.0, -4.0])
def test_with_little_room_rank_metrics_stay_within_half_a_percent(power: float) -> None:
    weight = spectrum(power)
    values = large_singular_values(lambda: weight, CPU, 0, 1000)
    exact = torch.linalg.svdvals(weight.double())
    for metric in (effective_rank, stable_rank, energy_rank):
        assert metric(values) == pytest.approx(metric(exact), rel=5e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_unfit(bad: float) -> None:
    weight = random(20, 5)
    weight[3, 2] = bad
    with pytest.raises(UnfitWeightError, match="NaN or infinite"):
        large_singular_values(lambda: weight, CPU, 1 << 40, 10)


def test_a_decomposition_that_does_not_converge_is_tried_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random(30, 6)

    def fails(*_: object) -> Tensor:
        raise large_weights.LinAlgError("it did not converge")

    monkeypatch.setattr(large_weights, "_by_blocks", fails)
    values = large_singular_values(lambda: weight, CPU, 0, 10)
    assert float(values[0]) == pytest.approx(float(torch.linalg.svdvals(weight)[0]))


PEAK = """
import resource, sys
from pathlib import Path
from dynarank.monitors.file_spectra import file_spectra
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert all(one.values is not None for one in file_spectra(Path(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
WEIGHTS = {
    "tall bf16": lambda: {"embed.weight": torch.zeros(100_000, 256, dtype=torch.bfloat16)},
    "tall fp32": lambda: {"embed.weight": torch.zeros(100_000, 256)},
    "wide bf16": lambda: {"l.weight": torch.zeros(256, 100_000, dtype=torch.bfloat16)},
    "wide fp32": lambda: {"l.weight": torch.zeros(256, 100_000)},
    "fp8": lambda: {"l.weight": torch.zeros(100_000, 256).to(torch.float8_e4m3fn),
                    "l.weight_scale_inv": torch.ones(782, 2)},
    "experts": lambda: {"experts.up_proj": torch.zeros(16, 256, 6400)},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_memory_is_bounded_by_twice_the_largest_tensor(
    kind: str, ending: str, tmp_path: Path
) -> None:
    """98 MiB in fp32, and a second tensor: beside what is loaded before."""
    from safetensors.torch import save_file

    path = tmp_path / f"m.{ending}"
    tensors = WEIGHTS[kind]() | {"other.weight": torch.zeros(50_000, 256)}
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    done = python(["-c", PEAK, path], check=True)
    largest = max(tensor.numel() for tensor in tensors.values())
    assert int(done.stdout) * 1024 < 8 * largest, done.stdout
