"""A window of the last gradients of weights that are about to change form.

The second moment of new factors cannot be computed from the old one, since it depends on the
correlations of the gradient's entries. It can be estimated from a few gradients, and the changes of
a schedule are usually known in advance. So the gradients of the last steps before a change are
stored, and each is transformed by the change as the first moment is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.surgery.optimizer_state import as_list
from dynarank.surgery.own_references import innermost
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import survey
from dynarank.surgery.state_layout import keeps_squares

__all__ = ["WINDOW", "GradientWindow"]

# Right after a change, 8 gradients are as good as 32 at a quarter of the memory (median error in
# decades when deflating to low-rank: 0.64 and 0.70; when inflating: 0.34 and 0.30; sd about 0.1,
# n = 8 seeds of benchmarks/training/studies/moments).
WINDOW = 8


class GradientWindow:
    """Stores the last gradients of the weights at ``paths`` just before each optimizer step.

    It is read-only: training is bit-for-bit the same. Until :meth:`watch` changes the paths, a bf16
    copy of each of the last ``length`` gradients is kept on its device, ``2 * length`` bytes per
    trainable entry (see ``nbytes``). Sparse gradients and steps that the gradient scaler will skip
    are not stored, nor is anything for optimizers without second moments (SGD), which need no
    calibration. They are part of the state of a :class:`RankScheduler`.

    Args:
        model: the model.
        optimizer: its optimizer or optimizers.
        paths: the paths of the weights, as in a plan.
        length: the number of gradients to keep.

    Raises:
        ValueError: ``length`` below 1, or no weight at a path.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> gradients = GradientWindow(model, optimizer, ["0"])
        >>> for _ in range(4):
        ...     model(torch.randn(2, 8)).sum().backward()
        ...     optimizer.step()
        >>> gradients.nbytes
        512
        >>> model = dr.deflate(model, 2, layers="0", optimizer=optimizer, moments=gradients)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        paths: Iterable[str] = (),
        *,
        length: int = WINDOW,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got length={length}")
        self.model, self.length = model, length
        steps = [one for given in as_list(optimizer) for one in innermost(given)]
        self._optimizers = [one for one in steps if keeps_squares(one)]
        self._rings: dict[str, _Ring] = {}
        self._hooks: list[Any] = []
        self.watch(paths)

    @property
    def nbytes(self) -> int:
        """The memory that the stored gradients currently take, in bytes."""
        kept = (g for ring in self._rings.values() for sample in ring.samples for g in sample)
        return sum(g.numel() * g.element_size() for g in kept)

    def watch(self, paths: Iterable[str], *, changed: bool = False) -> None:
        """Store gradients of only these weights from now on; with no paths, stop.

        Args:
            paths: of the weights.
            changed: whether weights may have other parameters than before, though the old ones are
                still alive: their gradients are then dropped.
        """
        wanted = set(paths)
        alive = not changed and all(ring.alive for ring in self._rings.values())
        if wanted == self._rings.keys() and alive:
            return
        sites = find_sites(self.model, survey(self.model), wanted) if wanted else {}
        rings = {path: _Ring(site.trained(), self.length) for path, site in sites.items()}
        old = self._rings
        self._rings = {
            path: old[path] if path in old and old[path].is_of(ring.parameters()) else ring
            for path, ring in rings.items()
        }
        if wanted and not self._hooks:
            self._hooks = [
                hook
                for one in self._optimizers
                for hook in (
                    one.register_step_pre_hook(self._before_step),
                    one.register_step_post_hook(self._after_step),
                )
            ]
        if not wanted:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def state_dict(self) -> dict[str, list[list[Tensor]]]:
        """The stored gradients of each watched weight, oldest first: of each parameter a tensor."""
        return {p: [list(sample) for sample in ring.samples] for p, ring in self._rings.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[Tensor]]]) -> None:
        """Watch the weights of a state and go on with their gradients.

        Raises:
            ValueError: they are gradients of other parameters. Nothing has changed then.
        """
        sites = find_sites(self.model, survey(self.model), state) if state else {}
        for path, site in sites.items():
            shapes = [p.shape for p in site.trained()]
            if wrong := [one for one in state[path] if [g.shape for g in one] != shapes]:
                raise ValueError(
                    f"layer {path!r} trains parameters of the shapes {[*map(tuple, shapes)]}, its "
                    f"saved gradients have {[tuple(g.shape) for g in wrong[0]]}; bring the model "
                    "to the forms of the saved run first"
                )
        self.watch(())
        self.watch(state)
        for path, site in sites.items():
            for sample in state[path]:
                pairs = zip(sample, site.trained(), strict=True)
                self._rings[path].samples.append(tuple(g.to(p.device) for g, p in pairs))

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("_rings", "_hooks")}
        return own | {"gradients": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        gradients = state.pop("gradients")
        vars(self).update(state, _rings={}, _hooks=[])
        self.load_state_dict(gradients)

    def of(self, parameters: Sequence[Parameter]) -> list[tuple[Tensor, ...]]:
        """The stored gradients of the weight with these parameters; empty if it is not watched."""
        found = (ring for ring in self._rings.values() if ring.is_of(parameters))
        samples = next((list(ring.samples) for ring in found), [])
        return [s for s in samples if all(bool(torch.isfinite(g).all()) for g in s)]

    def _before_step(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        if not _has_closure(args, named):
            self._read(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        if _has_closure(args, named):  # it has computed the gradients within the step
            self._read(optimizer)

    def _read(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "found_inf", None):  # the fused optimizers unscale in their step
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        for ring in self._rings.values():
            ring.read(held, scale)


def _has_closure(args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a step is given one; the first argument is the optimizer."""
    return any(one is not None for one in (*args[1:], *named.values()))


class _Ring:
    """The last gradients of one weight; the parameters are referenced weakly."""

    def __init__(self, parameters: Sequence[Parameter], length: int) -> None:
        self._refs = [ref(p) for p in parameters]
        self.samples: deque[tuple[Tensor, ...]] = deque(maxlen=length)

    def parameters(self) -> list[Parameter]:
        found = [one() for one in self._refs]
        return [p for p in found if p is not None]

    @property
    def alive(self) -> bool:
        return len(self.parameters()) == len(self._refs)

    def is_of(self, parameters: Sequence[Parameter]) -> bool:
        mine = self.parameters()
        return self.alive and [*map(id, mine)] == [*map(id, parameters)] != []

    @torch.no_grad()
    def read(self, held: set[int], scale: Tensor | None) -> None:
        parameters = self.parameters()
        grads = [p.grad for p in parameters if id(p) in held and p.grad is not None]
        if not grads or len(grads) < len(self._refs) or any(g.is_sparse for g in grads):
            return
        grads = grads if scale is None else [g / scale for g in grads]
        self.samples.append(tuple(g.detach().to(torch.bfloat16, copy=True) for g in grads))
