"""One step after a change: does everything go on with the new parameters?

An optimizer's groups hold them, since the change has put them there; but it may step what it keeps
elsewhere, and a group may have been replaced since. A step writes to a parameter, so its version
rises. Fused optimizers raise none, nor do those that write to ``p.data``: so the sign is a
parameter that stays while others of its group are written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.distributed.wrappers import live
from dynarank.forms import Change
from dynarank.surgery.let_go import check_let_go
from dynarank.surgery.own_references import groups_of, is_optimizer, wrapped
from dynarank.surgery.problem import listed
from dynarank.surgery.site import Site

__all__ = ["Guard"]


class Guard:
    """Watches the parameters that changes have made until their optimizer has stepped."""

    def __init__(self) -> None:
        self.changed = False
        self._new: dict[str, ref[Parameter]] = {}  # by name
        self._versions: dict[int, int] = {}  # of an optimizer's parameters, before its step
        self._left_out: dict[str, str] = {}  # by name, the optimizer that did not step it

    def expect(self, sites: Iterable[Site] = (), changes: Iterable[Change] = ()) -> None:
        """Check one step later that these changes, of some of the weights, have reached all."""
        self.changed = True
        after = {change.path: change.after for change in changes}
        for site in (replace(site, form=after[site.path]) for site in sites if site.path in after):
            own = {name: p for name, p in site.parameters().items() if p.requires_grad}
            self._new.update({f"{site.path}.{name}": ref(p) for name, p in own.items()})

    def before_step(self, optimizer: Optimizer) -> None:
        """Note what the parameters are before a step."""
        if self._new:
            held = (p for group in optimizer.param_groups for p in group["params"])
            self._versions = {id(p): p._version for p in held}

    def after_step(self, optimizer: Optimizer) -> None:
        """See which parameters with gradients the step has left out."""
        if not self._new:
            return
        names = {id(p): name for name, one in self._new.items() if (p := one()) is not None}
        for group in optimizer.param_groups:
            held: list[Parameter] = group["params"]
            stay = [p for p in held if p._version == self._versions.get(id(p))]
            for name in (names[id(p)] for p in held if id(p) in names):
                self._new.pop(name, None)
            for p in stay if len(stay) < len(held) else ():
                if p.grad is not None and id(p) in names:
                    self._left_out[names[id(p)]] = type(optimizer).__name__

    def check(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        """Raise RuntimeError if an optimizer or a container goes on with old parameters."""
        if self._new or self._left_out:
            self._check_stepped(optimizers)
        if self.changed:
            check_let_go(model, optimizers)
            self.changed = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(type(self)())

    def _check_stepped(self, optimizers: Sequence[Any]) -> None:
        if self._left_out:
            kinds, left_out, self._left_out = listed({*self._left_out.values()}), self._left_out, {}
            raise RuntimeError(
                f"{kinds} did not step {listed(left_out)}, made by a change of form, though its "
                "groups hold them: it steps parameters that it keeps elsewhere; make a new "
                "optimizer after each change, or use one that steps what its param_groups hold"
            )
        alive = {name: p for name, one in self._new.items() if (p := one()) is not None}
        trained = {name: p for name, p in alive.items() if p.requires_grad and p.grad is not None}
        lost = _not_held(trained, [w for one in optimizers for w in wrapped(one)])
        if lost and (lost := _not_held(lost, filter(is_optimizer, live(Optimizer)))):
            raise RuntimeError(
                f"no optimizer holds {listed(lost)}, made by a change of form, though they have "
                "gradients: param_groups were replaced after the change; leave them as the change "
                "has made them, or add these parameters"
            )
        self._new = {name: self._new[name] for name in alive}


def _not_held(parameters: Mapping[str, Any], optimizers: Iterable[Any]) -> dict[str, Any]:
    """Those of the parameters that no optimizer has in a group."""
    held = {id(p) for group in groups_of(list(optimizers)) for p in group["params"]}
    return {name: p for name, p in parameters.items() if id(p) not in held}
