"""Averages (EMA, SWA) that were left behind by a change of form.

torch's ``AveragedModel`` pairs parameters by position: after a change it would average what does
not belong together wherever shapes happen to broadcast, or factors of another basis. Who averages a
model cannot be asked, so those that are alive at a change have their next updates checked. Of
copies that are averaged by hand it is only seen afterwards that somebody writes to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from weakref import ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dynarank.distributed.unwrap import unwrapped
from dynarank.distributed.wrappers import live
from dynarank.surgery.copies import apart, is_copy
from dynarank.surgery.own_references import groups_of, is_optimizer

__all__ = ["LeftCopies", "check_updates"]

_UPDATE = "update_parameters"
_WAY = (
    "call ranks.follow(ema) once, before the first change, and it goes through all of them; or "
    "make a new average after each change"
)


def check_updates() -> None:
    """From now on, averages that are alive check that they fit before they are updated."""
    for one in live(AveragedModel):
        if not isinstance(vars(one).get(_UPDATE), CheckedUpdate) and "module" in one._modules:
            setattr(one, _UPDATE, CheckedUpdate(one))


class CheckedUpdate:
    """``update_parameters`` of an AveragedModel: refused while its forms are not the model's.

    Args:
        average: the AveragedModel.
    """

    def __init__(self, average: AveragedModel) -> None:
        self._average = average
        self._own = vars(average).get(_UPDATE)  # a user's, instead of the class's

    def __call__(self, model: nn.Module) -> None:
        """Update, if the average and the model mean the same by their parameters.

        Raises:
            RuntimeError: they do not. Nothing is averaged then.
        """
        average, model_inside = unwrapped(self._average.module), unwrapped(model)
        for path, why in _apart(model_inside, average):
            if not int(self._average.n_averaged) and "basis" in why:
                continue
            kind = type(self._average).__name__
            raise RuntimeError(
                f"this {kind} has not followed a change of form: layer {path!r} is {why}; {_WAY}"
            )
        if self._own is None:
            type(self._average).update_parameters(self._average, model)
        else:
            self._own(model)


class LeftCopies:
    """Copies of a model that are averaged by hand, it seems, and were left behind by a change.

    Those are copies of other forms, which no optimizer trains, and which somebody writes to.

    Args:
        model: without its wrappers, after the change.
        followed: the copies that have changed with it.
    """

    def __init__(self, model: nn.Module, followed: Sequence[nn.Module] = ()) -> None:
        spared = {id(one) for one in followed} | {id(module) for module in model.modules()}
        kinds = {type(model), getattr(model, "plain", type(model))}
        found = [o for o in live(*kinds) if id(o) not in spared and "_modules" in vars(o)]
        found = [one for one in found if is_copy(model, one)]
        self._copies = [(ref(one), _versions(one)) for one in found if any(_apart(model, one))]

    def warn(self, model: nn.Module) -> None:
        """Say which have been written to since."""
        for copy, before in self._copies:
            one = copy()
            if one is None or _versions(one) == before or not any(_apart(model, one)):
                continue
            if not _trains(one):
                warnings.warn(
                    f"a copy of the model ({type(one).__name__}) was written to after a change of "
                    "form that it has not followed: if it is an average of the model, it averages "
                    f"what does not belong together; {_WAY}",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return


def _apart(model: nn.Module, average: nn.Module) -> Iterator[tuple[str, str]]:
    """The modules whose parameters mean something else in the average, by path, and why."""
    others = dict(average.named_modules())
    for path, module in model.named_modules():
        if path in others and (why := apart(module, others[path])):
            yield path, why


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    found = (p for p in module.parameters() if not p.is_inference())
    return [(id(p), p._version) for p in found]


def _trains(module: nn.Module) -> bool:
    """Whether gradients reach it, or an optimizer holds its parameters."""
    ids = {id(p) for p in module.parameters()}
    held = groups_of([one for one in live(Optimizer) if is_optimizer(one)])
    return any(p.grad is not None for p in module.parameters()) or any(
        id(p) in ids for group in held for p in group["params"]
    )
