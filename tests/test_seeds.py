"""Tests draw the same numbers alone and in any order, and so do the fixtures that they share."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import settings
from torch import Tensor

FILE = "tests/test_seeds.py"


def draw() -> Tensor:
    return torch.rand(3)


def first_of(name: str) -> Tensor:
    """The first numbers of a generator that is seeded by a name."""
    return torch.rand(3, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@pytest.fixture(scope="module", params=[0, 1])
def shared() -> Tensor:
    return draw()


@pytest.fixture
def own() -> Tensor:
    return draw()


def test_a_test_draws_by_its_name(request: pytest.FixtureRequest) -> None:
    assert torch.equal(draw(), first_of(request.node.nodeid))


def test_a_fixture_of_a_test_draws_with_it(request: pytest.FixtureRequest, own: Tensor) -> None:
    assert torch.equal(own, first_of(request.node.nodeid))
    assert not torch.equal(own, draw())


@pytest.mark.parametrize("asked", ["first", "again"])
def test_a_shared_fixture_draws_by_its_own_name_and_leaves_the_tests_draws(
    request: pytest.FixtureRequest, shared: Tensor, asked: str
) -> None:
    assert torch.equal(shared, first_of(f"{FILE}::shared"))
    assert torch.equal(draw(), first_of(request.node.nodeid))


def test_hypothesis_repeats_its_examples(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--hypothesis-profile"):
        pytest.skip("another profile was asked for")
    assert settings().derandomize and settings().deadline is None
