"""Forms as plain data, for JSON: what records, checkpoints and schedules keep of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynarank.files.json_data import DamagedFileError, read_json
from dynarank.forms import FORMS, Form, Rank, Request, Within, form_name

__all__ = [
    "form_from_data",
    "form_to_data",
    "read_plan",
    "request_from_data",
    "request_to_data",
]

_BUDGET = "budget"  # the key that marks a budget among forms


def form_to_data(form: Form) -> dict[str, Any]:
    """The form as plain data.

    Example:
        >>> list(form_to_data(dr.LowRank(8)).items())[:3]
        [('form', 'low-rank'), ('rank', 8), ('decomposition', 'svd')]
    """
    data = dict(vars(form))
    if isinstance(rank := data.get("rank"), Rank):
        data["rank"] = dict(vars(rank))
    return {"form": form_name(form), **data}


def form_from_data(data: Mapping[str, Any]) -> Form:
    """The inverse of :func:`form_to_data`.

    Raises:
        ValueError: an unknown form, or values that it refuses.
    """
    values = dict(data)
    name = values.pop("form", None)
    if name not in FORMS:
        raise ValueError(f"unknown form {name!r}; known: {', '.join(FORMS)}")
    if isinstance(rank := values.get("rank"), Mapping):
        values["rank"] = Rank(**rank)
    return FORMS[name](**values)


def request_to_data(request: Request) -> dict[str, Any]:
    """A schedule's answer, forms and budgets by path, as plain data.

    Example:
        >>> request_to_data({"a": Within(flops=0.5)})["a"]["budget"]["flops"]
        0.5
    """
    return {
        path: {_BUDGET: dict(vars(one))} if isinstance(one, Within) else form_to_data(one)
        for path, one in request.items()
    }


def request_from_data(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Form | Within]:
    """The inverse of :func:`request_to_data`.

    Raises:
        ValueError: an unknown form, or values that it or a budget refuses.
    """
    return {
        path: Within(**one[_BUDGET]) if _BUDGET in one else form_from_data(one)
        for path, one in data.items()
    }


def read_plan(path: str | Path) -> dict[str, Form]:
    """A plan from a JSON file, forms by the paths of layers, for :func:`dynarank.apply_plan`.

    Args:
        path: a file as ``dynarank spectrum --suggest`` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not JSON, or not of forms by path.

    Example:
        >>> path = getfixture("tmp_path") / "plan.json"
        >>> _ = path.write_text('{"0": {"form": "low-rank", "rank": 2}}')
        >>> _ = dr.apply_plan(nn.Sequential(nn.Linear(8, 8)), read_plan(path))
    """
    data: Any = read_json(Path(path))
    try:
        return {name: form_from_data(one) for name, one in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"it is not a plan, forms by the paths of layers: {error}"
        raise DamagedFileError(path, problem) from None
