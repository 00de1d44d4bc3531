"""Averages (EMA, SWA) that were left behind by a change of form.

torch's ``AveragedModel`` pairs parameters by position: after a change it would average what does
not belong together wherever shapes happen to broadcast, or factors of another basis. torch has no
hook there, so once a weight has changed form, ``update_parameters`` itself looks first. Of copies
that are averaged by hand it is only seen afterwards that somebody writes to them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.unwrap import unwrapped
from dynarank.distributed.wrappers import live
from dynarank.layers import RankedLayer
from dynarank.layers.ranked import copied_layers
from dynarank.surgery.copies import apart, factored_forms
from dynarank.surgery.own_references import groups_of, is_optimizer

__all__ = ["LeftCopies", "check_updates"]

Versions: TypeAlias = list[tuple[ref[nn.Parameter], int, Tensor]]

_OURS = "checks_that_it_fits"
_WAY = (
    "call ranks.follow(ema): it is brought to the model's forms, and goes through all later "
    "changes of the rank scheduler; or make a new average after each change"
)


def check_updates() -> None:
    """From now on, every AveragedModel checks that it fits its model before it is updated."""
    update: Any = AveragedModel.update_parameters
    if not hasattr(update, _OURS):
        AveragedModel.update_parameters = _checked(update)


def _checked(update: Any) -> Any:
    @functools.wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        _check(self, unwrapped(model))
        update(self, model)

    setattr(update_parameters, _OURS, True)
    return update_parameters


def _check(average: AveragedModel, model: nn.Module) -> None:
    """Raise RuntimeError if an average and a model mean other things by their parameters.

    An average that is still to take the model's first values may have another basis.
    """
    fresh = not int(average.n_averaged)
    others = dict(unwrapped(average.module).named_modules())
    for path, module in model.named_modules():
        if path in others and (why := apart(module, others[path], basis=not fresh)):
            raise RuntimeError(
                f"this {type(average).__name__} has not followed a change of form: layer {path!r} "
                f"is {why}. Nothing is averaged; {_WAY}"
            )


class LeftCopies:
    """Copies of layers that a change leaves behind, made before it.

    Args:
        layers: those that are about to change.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        self._layers, self._frozen = list(map(ref, layers)), list[tuple[ref[nn.Module], Versions]]()
        ranked = [one for one in layers if isinstance(one, RankedLayer)]
        made = {name: one for one in ranked for name in one.made_by.values() if name}
        pairs = [(c, made[n]) for c, by in copied_layers() for n in by.values() if n in made]
        self._pairs = [(ref(c), ref(one), _versions(c)) for c, one in pairs if c not in ranked]

    def expect(self) -> None:
        """After the change: look at layers that have changed and do not train, too."""
        changed = [
            one for weak in self._layers if (one := weak()) is not None and factored_forms(one)
        ]
        frozen = [one for one in changed if not any(p.requires_grad for p in one.parameters())]
        self._frozen = [(ref(one), _versions(one)) for one in frozen]

    def warn(self) -> None:
        """Say if somebody who trains none of them has written to one since."""
        self._warn_of_frozen()
        for copy, layer, before in self._pairs:
            one, original = copy(), layer()
            if one is None or original is None or not apart(original, one):
                continue
            if _is_written(one, before) and not _trains(one):
                warnings.warn(
                    f"a copy of a layer ({type(one).__name__}) was written to after a change of "
                    "form that it has not followed: if it is in an average of the model, that "
                    f"averages what does not belong together; {_WAY}",
                    RuntimeWarning,
                    stacklevel=5,
                )
                return

    def _warn_of_frozen(self) -> None:
        for weak, before in self._frozen:
            if (one := weak()) is not None and _is_written(one, before) and not _trains(one):
                warnings.warn(
                    f"a frozen layer of the model ({type(one).__name__}) was written to after a "
                    "change of form: if it is in an average of another part of the model (a "
                    "momentum encoder), its factors do not mix with those of the other; "
                    "give the rank scheduler the part that trains alone, RankScheduler(model.part, "
                    "...), and call ranks.follow(model.average)",
                    RuntimeWarning,
                    stacklevel=6,
                )
                return


def _versions(module: nn.Module) -> Versions:
    """Its parameters; sums tell what is written to ``p.data``, which raises no version."""
    known = [p for p in module.parameters() if not (p.is_inference() or p.is_meta or is_dtensor(p))]
    return [(ref(p), p._version, p.detach().sum()) for p in known]


def _is_written(module: nn.Module, before: Versions) -> bool:
    """Whether its parameters are those of before, with other values."""
    now = _versions(module)
    if [id(p()) for p, *_ in now] != [id(p()) for p, *_ in before]:
        return False
    pairs = zip(now, before, strict=True)
    return any(n != m or not x.allclose(y, 0, 0, True) for (_, n, x), (_, m, y) in pairs)


def _trains(module: nn.Module) -> bool:
    """Whether gradients reach it, or an optimizer holds its parameters."""
    ids = {id(p) for p in module.parameters()}
    held = groups_of([one for one in live(Optimizer) if is_optimizer(one)])
    return any(p.grad is not None for p in module.parameters()) or any(
        id(p) in ids for group in held for p in group["params"]
    )
