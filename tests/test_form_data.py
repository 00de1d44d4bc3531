"""Forms survive JSON, and what is no form is refused."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Form, RankLike

shares = st.floats(0, 1, exclude_min=True)
FORMS: list[Form] = [
    FullRank(),
    LowRank(8),
    LowRank(0.5),
    LowRank(Rank(0.25, of="out"), "other"),
    Adapted(8),
    Adapted(0.3, alpha=1.5, execution="two-branch"),
    Adapted(Rank(1.0, of="min"), "other", 2.0),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_survives_json(form: Form) -> None:
    back = form_from_data(json.loads(json.dumps(form_to_data(form))))
    assert back == form
    assert type(back) is type(form)
    assert type(getattr(back, "rank", None)) is type(getattr(form, "rank", None))


@settings(deadline=None, max_examples=40)
@given(
    st.one_of(
        st.integers(1, 1000), shares, st.builds(Rank, shares, st.sampled_from(["out", "min"]))
    ),
    st.floats(1e-3, 1e3),
    st.sampled_from(["merged", "two-branch"]),
)
def test_any_adapted_form_survives_json(rank: RankLike, alpha: float, execution: str) -> None:
    form = Adapted(rank, "svd", alpha, execution)  # type: ignore[arg-type]
    assert form_from_data(json.loads(json.dumps(form_to_data(form)))) == form


def test_a_form_with_a_numpy_rank_survives_json() -> None:
    form = LowRank(np.int64(8))  # type: ignore[arg-type]
    assert form_from_data(json.loads(json.dumps(form_to_data(form)))) == LowRank(8)


def test_plain_data_of_the_forms() -> None:
    assert form_to_data(FullRank()) == {"form": "full-rank"}
    assert form_to_data(LowRank(Rank(0.5, of="min"))) == {
        "form": "low-rank",
        "rank": {"value": 0.5, "of": "min", "multiple_of": 1},
        "decomposition": "svd",
        "execution": "auto",
        "recompute": False,
    }
    assert form_to_data(Adapted(2)) == {
        "form": "adapted",
        "rank": 2,
        "decomposition": "svd",
        "alpha": 16.0,
        "execution": "auto",
        "recompute": False,
        "restart": 0,
    }


@pytest.mark.parametrize("data", [{"form": "tall"}, {"rank": 3}, {"form": None}, {}])
def test_an_unknown_form_is_refused_and_the_known_are_listed(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"unknown form .*full-rank, low-rank, adapted"):
        form_from_data(data)


def test_reading_a_form_validates_it_and_leaves_the_data_as_they_were() -> None:
    data = {"form": "adapted", "rank": 4, "alpha": -1.0}
    with pytest.raises(ValueError, match="alpha"):
        form_from_data(data)
    assert data == {"form": "adapted", "rank": 4, "alpha": -1.0}
    with pytest.raises(ValueError, match="at least 1"):
        form_from_data({"form": "low-rank", "rank": 0})
