from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.forms import form_name
from dynarank.layers import WeightSpec

WRONG = [
    (0, ValueError, "at least 1, got 0"),
    (-3, ValueError, "at least 1, got -3"),
    (np.int64(0), ValueError, "at least 1"),
    (0.0, ValueError, r"\(0, 1\], got 0.0"),
    (-0.5, ValueError, r"\(0, 1\], got -0.5"),
    (1.5, ValueError, r"\(0, 1\], got 1.5.*give an int"),
    (math.nan, ValueError, r"\(0, 1\], got nan"),
    (math.inf, ValueError, r"\(0, 1\], got inf"),
    (True, TypeError, "got True"),
    (False, TypeError, "got False"),
    ("8", TypeError, "got '8'"),
    (None, TypeError, "got None"),
    ((1, 2), TypeError, r"got \(1, 2\)"),
]


@pytest.mark.parametrize(("rank", "kind", "message"), WRONG, ids=repr)
@pytest.mark.parametrize("form", [LowRank, Adapted])
def test_a_form_refuses_an_impossible_rank(
    form: type[LowRank] | type[Adapted], rank: object, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        form(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Rank(value)


def test_a_share_is_of_one_of_three_things() -> None:
    with pytest.raises(ValueError, match='"cost", "out" or "min", got \'in\''):
        Rank(0.5, of="in")  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_alpha_must_be_positive_and_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive and finite, got"):
        Adapted(2, alpha=alpha)


@pytest.mark.parametrize("execution", ["joined", "", "two_branch", None])
def test_execution_is_one_of_three_words(execution: str) -> None:
    with pytest.raises(ValueError, match="'auto', 'merged', 'two-branch', got"):
        Adapted(2, execution=execution)  # type: ignore[arg-type]


def test_defaults_of_the_forms() -> None:
    assert LowRank(2).decomposition == Adapted(2).decomposition == "svd"
    assert Adapted(2).alpha == 16.0
    assert Adapted(2).execution == "auto"
    assert Rank(0.5).of == "cost"


def test_the_scale_is_alpha_over_the_resolved_rank() -> None:
    assert Adapted(4, alpha=6.0).scale == 1.5
    with pytest.raises(ValueError, match=r"a share for a rank.*resolve"):
        _ = Adapted(0.5).scale


def test_a_resolved_form_has_a_whole_number_for_a_rank() -> None:
    form = WeightSpec("weight", (8, 6)).resolve(LowRank(0.5))
    assert isinstance(form, LowRank) and form.resolved_rank == 1
    assert LowRank(np.int64(3)).resolved_rank == 3
    for share in (0.5, Rank(0.5, of="min")):
        with pytest.raises(ValueError, match=r"LowRank\(rank=.*resolve the form with WeightSpec"):
            _ = LowRank(share).resolved_rank


def test_resolving_a_form_changes_its_rank_alone() -> None:
    form = Adapted(Rank(0.5, of="min"), alpha=3.0, execution="two-branch")
    resolve = WeightSpec("weight", (8, 6)).resolve
    assert resolve(form) == Adapted(3, alpha=3.0, execution="two-branch")
    assert resolve(LowRank(Rank(0.5, of="out"))) == LowRank(4)
    assert resolve(FullRank()) == FullRank()


def test_a_rank_may_be_a_number_of_another_library() -> None:
    assert LowRank(torch.tensor(0.5)).rank == 0.5  # type: ignore[arg-type]
    assert LowRank(torch.tensor(4)).rank == 4  # type: ignore[arg-type]


def test_a_form_has_a_name_whatever_its_rank() -> None:
    forms = (FullRank(), LowRank(8), Adapted(0.5))
    assert [form_name(form) for form in forms] == ["full-rank", "low-rank", "adapted"]
