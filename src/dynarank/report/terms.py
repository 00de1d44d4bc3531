"""What the words for forms and changes of form mean, for those that occur in the runs."""

from __future__ import annotations

from collections.abc import Sequence

from dynarank.records import ChangeRecord, PhaseRecord, Run
from dynarank.report.markup import Html, element
from dynarank.report.transition_points import change_kind

__all__ = ["terms"]

_LOW_RANK = "the weight is a product of small factors, which are trained in its place"
_ADAPTED = (
    "the weight is frozen; an adapter, small factors whose product is added to it, is trained"
)
_CHANGES = {
    "inflate": "the factors are multiplied out, and the layer goes on as a full-rank one",
    "adapt": "the product of the factors is frozen, and an adapter is trained beside it",
    "restart": "an adapter is merged into its weight, and a new one begins at zero",
    "resize": "the layer keeps its form and gets another rank or decomposition",
}
_CUT = "the weight is cut to factors of low rank: only its largest singular values are kept"
_FREEZE = "the weight is frozen as it is, and an adapter is trained beside it"


def terms(runs: Sequence[Run]) -> Html:
    """A list of the words that the page uses of these runs; empty if all are full-rank throughout.

    Example:
        >>> terms([])
        ''
    """
    forms = {form for r in runs for phase in r.all(PhaseRecord) for form in phase.forms}
    changes = [change for run in runs for change in run.all(ChangeRecord)]
    forms |= {str(form.get("form")) for c in changes for form in (c.before, c.after)}
    said = {"low-rank": _LOW_RANK} if "low-rank" in forms else {}
    said |= {"adapted": _ADAPTED} if "adapted" in forms else {}
    kinds = {change_kind(change) for change in changes}
    said |= {kind: meaning for kind, meaning in _CHANGES.items() if kind in kinds}
    if "deflate" in kinds:
        said["deflate"] = "; or ".join(sorted({_deflate(c) for c in changes} - {""}))
    listed = [element("li", element("b", word), f": {meaning}") for word, meaning in said.items()]
    return element("ul", *listed, class_="terms") if listed else Html("")


def _deflate(change: ChangeRecord) -> str:
    if change_kind(change) != "deflate":
        return ""
    return _FREEZE if change.after.get("form") == "adapted" else _CUT
