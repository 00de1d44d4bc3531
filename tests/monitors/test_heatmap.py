from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynarank.monitors.heatmap import heatmap


def by_loop(weight: Tensor, size: int) -> list[list[float]]:
    matrix = weight.flatten(1)
    n, m = matrix.shape
    k, h = min(n, size), min(m, size)
    rows = []
    for i in range(k):
        row = []
        for j in range(h):
            block = matrix[i * n // k : (i + 1) * n // k, j * m // h : (j + 1) * m // h]
            row.append(sum(abs(float(x)) for x in block.flatten()) / block.numel())
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 33))
def test_it_is_the_mean_absolute_value_of_each_block(out: int, ins: int, size: int) -> None:
    weight = torch.randn(out, ins, generator=torch.Generator().manual_seed(out + 97 * ins))
    picture, expected = heatmap(weight, size), by_loop(weight, size)
    assert len(picture) == min(out, size) and len(picture[0]) == min(ins, size)
    torch.testing.assert_close(torch.tensor(picture), torch.tensor(expected))


def test_a_convolution_is_a_matrix_of_its_kernel_positions() -> None:
    weight = torch.randn(6, 5, 3, 3)
    torch.testing.assert_close(
        torch.tensor(heatmap(weight)), torch.tensor(by_loop(weight, 32)), rtol=1e-5, atol=1e-6
    )
    assert len(heatmap(weight)) == 6 and len(heatmap(weight)[0]) == 32


def test_half_precision_is_averaged_in_single() -> None:
    weight = torch.full((4096, 4), 1.0, dtype=torch.bfloat16)
    assert heatmap(weight, 1) == ((1.0,),)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heatmap(torch.full((3, 3), 1 / 3), 1)[0][0] == pytest.approx(1 / 3, rel=1e-6)


def test_what_is_not_finite_is_shown() -> None:
    weight = torch.ones(4, 4)
    weight[0, 0], weight[3, 3] = math.nan, -math.inf
    picture = heatmap(weight, 2)
    assert math.isnan(picture[0][0]) and picture[1][1] == math.inf and picture[0][1] == 1.0


def test_an_empty_weight_has_no_blocks() -> None:
    assert heatmap(torch.zeros(0, 4)) == () and heatmap(torch.zeros(4, 0)) == ()


def test_what_is_no_weight_and_no_size_are_errors() -> None:
    with pytest.raises(ValueError, match=r"two or more dimensions, got shape \(4,\)"):
        heatmap(torch.zeros(4))
    with pytest.raises(ValueError, match="size=0"):
        heatmap(torch.zeros(4, 4), 0)
