"""How an optimizer's running average of a weight (ASGD's ``ax``) changes with the weight's form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynarank.decompositions import Factors, precise
from dynarank.surgery.edit import Edit
from dynarank.surgery.side import Side

__all__ = ["moved_average"]


def moved_average(edit: Edit, new: Side, averages: Sequence[Tensor | None]) -> Factors:
    """The averages of the new parameters: ``f' + J^+(A - W')``.

    A is the weight that the old averages stand for. The new parameters' averages stand for it too,
    as far as parameters near f' can, so that they mix with what is averaged from now on.

    Args:
        edit: the change.
        new: its side after, in fp64.
        averages: of each old parameter that trains; None: that parameter itself.
    """
    spec, change = edit.site.spec, edit.change
    values = {name: precise(p) for name, p in edit.old.items()}
    trained = [name for name in values if not spec.is_base(name)]
    given = zip(trained, averages, strict=True)
    values |= {name: precise(value) for name, value in given if value is not None}
    average = spec.to_canonical(spec.effective(change.before, values))
    now = {name: precise(p) for name, p in edit.new.items()}
    weight = spec.to_canonical(spec.effective(change.after, now))
    changes = new.toward(average - weight)
    return tuple(p + c for p, c in zip(new.parameters, changes, strict=True))
