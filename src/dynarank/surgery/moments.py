"""What a weight's optimizer moments become when it changes form.

Legend: W the effective weight, G its gradient; f the parameters of a form (W itself, or factors),
J = vjp of ``scale * join`` at f, so that dL/df = J(G); J+ its least-norm right inverse (the
decomposition's ``lift``). m, v an optimizer's averages of a parameter's gradient and of its square,
Adam's divided by ``1 - beta^step``; primes for the new form.

- **First moment:** ``m' = J'(J+(m - c f)) + c f'``. To factors it is exact if they stood still over
  the averaging window; from factors it is the least M that agrees with them. ``c f`` is the share
  of L2 weight decay, which is no gradient of W. See Note [Weight decay].
- **Second moment, projected:** the variance ``v - m * m`` goes on as if entries were independent
  (LDAdam's form, Robert et al., arXiv 2410.16103):
  ``v' = J'_(f*f)(lift_squares(v - m*m)) + m'*m'``. Too low where a row's gradients are correlated.
- **Second moment, calibrated:** each kept gradient goes on as a first moment does and is squared
  then: ``v' = s mean_t (J'(J+(g_t)))^2``; ``s = sum v / sum mean_t g_t^2`` keeps the size that v
  remembers from some thousand steps.
- **Bound:** always ``v' >= m' * m'``, so that the next step is at most the learning rate in every
  entry; a v that vanishes under an m that does not would make steps without bound. Adam's own v is
  below m * m in its first hundred or so steps: a change that early makes the next steps smaller.
- A parameter that gets nothing (an adapter's ``down``, while ``up`` is zero) starts as a new one.
- **Pruned:** from adapter to adapter, as ReLoRA (Lialin et al., arXiv 2307.05695), :func:`prune`.

Note [Weight decay]
SGD's and Adam's L2 decay adds ``decay * f`` to the gradient of f. J+ divides by the factors, so
where they are small (an adapter's ``up`` starts at zero) that share, lifted as if it were a
gradient, is amplified without bound: the momentum of a small convolutional network came back 20 to
9,000 times too large (benchmarks/training/experiments/moments). The share is ``c f`` with c at most
``decay`` times the average's gain: the regression of J+(m) on J+(f) within these limits, which is
sharp where it matters and needs no count of steps. It goes on as ``c f'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from dynarank.decompositions import Factors, precise
from dynarank.forms import Adapted, Form, FullRank
from dynarank.layers import WeightSpec

__all__ = ["Averaging", "GradientSamples", "Side", "carry", "prune"]

# Optimizer state by role: SGD's velocity and Adam's averages; steps are copied, not transformed.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
COUNTERS = ("step",)
# What ReLoRA's authors found to do well, of the first moment's entries by their size.
PRUNED = 0.9


@dataclass(frozen=True)
class Averaging:
    """How an optimizer averages, by the options of a group."""

    betas: tuple[float, float] | None  # Adam's; None: a velocity, which has no bias correction
    decay: float  # L2 weight decay, a part of the gradient; 0 if decoupled
    gain: float  # the weight of a constant in the (bias-corrected) first moment

    @staticmethod
    def of(group: Mapping[str, Any]) -> Averaging:
        """Those of a parameter group of SGD, Adam, AdamW or RAdam."""
        decay = 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0))
        if "betas" in group:
            first, second = group["betas"]
            return Averaging((float(first), float(second)), decay, 1.0)
        momentum, dampening = float(group.get("momentum", 0)), float(group.get("dampening", 0))
        gain = (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0
        return Averaging(None, decay, gain)

    def corrections(self, step: Any) -> tuple[float, float]:
        """What the averages of a constant are, relative to it and its square, after ``step``."""
        if self.betas is None or step is None:
            return 1.0, 1.0
        steps = max(float(step), 1.0)
        return 1 - self.betas[0] ** steps, 1 - self.betas[1] ** steps


class GradientSamples(Protocol):
    """Gradients kept of weights that are about to change, as a :class:`GradientWindow` does."""

    def of(self, parameters: Sequence[Parameter], /) -> Sequence[Factors]:
        """The kept gradients of a weight made up of these parameters; none if there are none."""
        ...


@dataclass(frozen=True)
class Side:
    """A weight in one form, and the maps between moments of W (canonical) and its parameters'."""

    parameters: Factors
    scale: float
    _pull: Callable[[Factors, Tensor], Factors]
    _lift: Callable[[Factors, Factors], Tensor]
    _lift_squares: Callable[[Factors, Factors], Tensor]

    @staticmethod
    def of(spec: WeightSpec, form: Form, parameters: Mapping[str, Tensor]) -> Side:
        """The side of these parameters, in their dtype."""
        if isinstance(form, FullRank):

            def lift(_: Factors, moments: Factors) -> Tensor:
                return spec.to_canonical(moments[0])

            whole = tuple(parameters.values())
            return Side(whole, 1.0, lambda _, moment: (spec.from_canonical(moment),), lift, lift)
        scale = form.scale if isinstance(form, Adapted) else 1.0
        d, factors = spec.decomposition(form), spec.factors(form, parameters)
        return Side(factors, scale, d.pull, d.lift, d.lift_squares)

    def to(self, dtype: torch.dtype) -> Side:
        """The same, computing in ``dtype``."""
        return replace(self, parameters=tuple(p.to(dtype) for p in self.parameters))

    def pull(self, moment: Tensor) -> Factors:
        """J: a moment of the parameters from one of W."""
        return self._pull(self.parameters, self.scale * moment)

    def lift(self, moments: Factors) -> Tensor:
        """J+: the least moment of W that pulls to these."""
        return self._lift(self.parameters, moments) / self.scale

    def pull_squares(self, square: Tensor) -> Factors:
        """Variances of the parameters from those of W, its entries independent."""
        return self._pull(tuple(p.square() for p in self.parameters), self.scale**2 * square)

    def lift_squares(self, squares: Factors) -> Tensor:
        """An estimate of W's variances from its parameters'."""
        return self._lift_squares(self.parameters, squares) / self.scale**2


def carry(
    old: Side,
    new: Side,
    states: Sequence[Mapping[str, Any]],
    averaging: Averaging,
    samples: Sequence[Factors] = (),
) -> list[dict[str, Any]]:
    """The states of the new side's parameters; empty for one that starts as a new one.

    Args:
        old: the side before, in the precision to compute in.
        new: the side after.
        states: for each old parameter; empty if the optimizer has not stepped on it.
        averaging: the optimizer's.
        samples: gradients of the old parameters, to calibrate the second moments by.
    """
    step = max((s["step"] for s in states if s.get("step") is not None), key=float, default=None)
    one, two = averaging.corrections(step)
    mean = _average(old, states, FIRST_MOMENTS, averaging)
    share = _decay_share(old, mean, averaging)
    gained = new.pull(old.lift(mean) - share * old.lift(old.parameters))
    means = tuple(g + share * p for g, p in zip(gained, new.parameters, strict=True))
    values = {key: tuple(one * m for m in means) for key in _present(states, FIRST_MOMENTS)}
    alive = [bool(g.any()) for g in gained]
    for key in _present(states, SECOND_MOMENTS):
        square = _average(old, states, (key,), averaging)
        if samples:
            squares = _calibrated(old, new, samples, share, square)
        else:
            variance = tuple((v - m * m).clamp(min=0) for v, m in zip(square, mean, strict=True))
            spread = new.pull_squares(old.lift_squares(variance))
            squares = tuple(v + m * m for v, m in zip(spread, means, strict=True))
        pairs = zip(squares, means, strict=True)
        values[key] = tuple(torch.maximum(two * v, (one * m).square()) for v, m in pairs)
        alive = [a or bool(v.any()) for a, v in zip(alive, squares, strict=True)]
    return [_state(i, step, values) if alive[i] else {} for i in range(len(new.parameters))]


def prune(states: Sequence[Mapping[str, Any]], share: float = PRUNED) -> list[dict[str, Any]]:
    """The states with the smallest entries of each average set to zero; their steps stay.

    ``keep = |m| > the share-quantile of |m|``; ``m' = keep m`` and ``v' = keep max(v, m^2)``.

    Args:
        states: of each parameter; one without a first moment stays as it is.
        share: how many entries of each parameter become zero.

    Example:
        >>> (state,) = prune([{"momentum_buffer": torch.tensor([3.0, -4.0, 1.0, 2.0])}], 0.5)
        >>> state["momentum_buffer"].tolist()
        [3.0, -4.0, 0.0, 0.0]
    """
    return [_pruned(state, share) for state in states]


def _pruned(state: Mapping[str, Any], share: float) -> dict[str, Any]:
    key = next((k for k in FIRST_MOMENTS if state.get(k) is not None), None)
    if key is None:
        return dict(state)
    mean = precise(state[key])
    sizes = mean.abs().flatten()
    least = sizes.kthvalue(max(1, math.ceil(share * sizes.numel()))).values
    keep = mean.abs() > least  # one choice for both averages: an m without its v is without bound
    pruned = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    pruned[key] = mean * keep
    for other in (k for k in SECOND_MOMENTS if state.get(k) is not None):
        pruned[other] = torch.maximum(precise(state[other]), mean.square()) * keep
    return pruned


def _present(states: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if any(s.get(key) is not None for s in states)]


def _average(
    side: Side, states: Sequence[Mapping[str, Any]], keys: Sequence[str], averaging: Averaging
) -> Factors:
    """The bias-corrected averages under the first of these names that is there, else zeros."""
    found: list[Tensor] = []
    for parameter, state in zip(side.parameters, states, strict=True):
        value = next((state[key] for key in keys if state.get(key) is not None), None)
        corrections = averaging.corrections(state.get("step"))
        by = corrections[keys != FIRST_MOMENTS]
        found.append(torch.zeros_like(parameter) if value is None else precise(value) / by)
    return tuple(found)


def _decay_share(side: Side, mean: Factors, averaging: Averaging) -> float:
    """The c of ``m = J(M) + c f``, between 0 and decay * gain; see Note [Weight decay]."""
    most = averaging.decay * averaging.gain
    if most == 0:
        return 0.0
    decay, whole = side.lift(side.parameters), side.lift(mean)
    energy = decay.square().sum()
    fitted = (whole * decay).sum() / energy if energy > 0 else energy
    return float(fitted.clamp(0, most))


def _calibrated(
    old: Side, new: Side, samples: Sequence[Factors], share: float, square: Factors
) -> Factors:
    """``s mean_t (J'(J+(g_t)) + c f')^2``, each in fp32: they were kept in bf16."""
    there, here = old.to(torch.float32), new.to(torch.float32)
    totals = tuple(torch.zeros_like(p) for p in new.parameters)
    energy = 0.0
    for sample in (tuple(g.float() for g in one) for one in samples):
        moved = here.pull(there.lift(sample))
        for total, g, p in zip(totals, moved, here.parameters, strict=True):
            total += (g + share * p).square()
        pairs = zip(sample, there.parameters, strict=True)
        energy += sum(float((g + share * p).square().sum()) for g, p in pairs)
    known = sum(float(v.sum()) for v in square)
    return tuple(total * (known / energy if energy > 0 else 0.0) for total in totals)


def _state(index: int, step: Any, values: Mapping[str, Factors]) -> dict[str, Any]:
    counted = {} if step is None else {"step": step.clone() if isinstance(step, Tensor) else step}
    return counted | {key: parts[index] for key, parts in values.items()}
