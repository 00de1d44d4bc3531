"""How an optimizer's moments of a weight change with the weight's form.

Legend: W the effective weight, G its gradient; f the parameters of a form (W itself, or factors),
J = vjp of ``scale * join`` at f, so that dL/df = J(G); J+ its least-norm right inverse (the
decomposition's ``lift``). m, v an optimizer's averages of a parameter's gradient and of its square,
Adam's divided by ``1 - beta^step``; primes for the new form.

- **First moment:** ``m' = J'(J+(m - c f)) + c f'``. To factors it is exact if they stood still over
  the averaging window; from factors it is the smallest M that agrees with them. ``c f`` is the part
  that comes from L2 weight decay, which is no gradient of W. See Note [Weight decay].
- **Second moment, projected:** the variance ``v - m * m`` is moved as if entries were independent
  (as in LDAdam, Robert et al., arXiv 2410.16103):
  ``v' = J'_(f*f)(lift_squares(v - m*m)) + m'*m'``. Too low where a row's gradients are correlated.
- **Second moment, calibrated:** each kept gradient is moved as a first moment is, then squared:
  ``v' = s mean_t (J'(J+(g_t)))^2``; ``s = sum v / sum mean_t g_t^2`` keeps the size of v, which
  averages over about a thousand steps.
- **Bound:** always ``v' >= m' * m'``, also as rounded to their dtype, so that the next step is at
  most the learning rate in every entry; a v near zero under an m that is not would make steps
  without bound. Adam's own v is below m * m in its first hundred or so steps: a change that early
  makes the next steps smaller.
- **Limit:** J+ divides by factors that may have become small; see Note [Limit] in
  :mod:`dynarank.surgery.side`.
- A parameter that gets nothing (an adapter's ``down``, while ``up`` is zero) starts without state.
- Optimizers that keep other averages: :mod:`dynarank.surgery.state_layout`.
- **Pruned:** from adapter to adapter, as ReLoRA (Lialin et al., arXiv 2307.05695), :func:`prune`.

Note [Weight decay]
L2 weight decay adds ``decay * f`` to the gradient of f in SGD and Adam. J+ divides by the factors,
so where they are small (an adapter's ``up`` starts at zero) lifting this part as if it were a
gradient amplifies it without bound: the momentum of a small convolutional network came back 20 to
9,000 times too large (benchmarks/training/studies/moments). The part is ``c f`` with c at most
``decay`` times the average's gain; we take the regression of J+(m) on J+(f) within these limits,
sharp where it matters and without a count of steps. The new parameters get ``c f'``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from dynarank.decompositions import Factors, UnfitWeightError, all_finite, precise
from dynarank.surgery.side import Side
from dynarank.surgery.state_layout import AVERAGES, Averaging, StateLayout

__all__ = ["GradientSamples", "carry", "check_known", "check_states", "prune", "settled"]


class GradientSamples(Protocol):
    """Recent gradients of some weights, as a :class:`GradientWindow` keeps them."""

    def of(self, parameters: Sequence[Parameter], /) -> Sequence[Factors]:
        """The kept gradients of the weight that these parameters make up; empty if none."""
        ...


def carry(
    old: Side,
    new: Side,
    states: Sequence[Mapping[str, Any]],
    averaging: Averaging,
    samples: Sequence[Factors] = (),
    layout: StateLayout = AVERAGES,
) -> list[dict[str, Any]]:
    """The states of the new side's parameters; empty for one that starts without state.

    Args:
        old: the side before, in the precision to compute in.
        new: the side after.
        states: for each old parameter, as ``layout`` reads it; empty if the optimizer has not
            stepped on it.
        averaging: the optimizer's.
        samples: gradients of the old parameters, to calibrate the second moments by.
        layout: which entries of the states are averages, and of what.
    """
    counted = layout.common(states)
    one, two = averaging.corrections(counted.get("step"))
    mean = means = tuple(map(torch.zeros_like, old.parameters))
    share, values, alive = 0.0, dict[str, Factors](), [False] * len(new.parameters)
    for key in reversed(present := _present(states, layout.means)):
        mean = _average(old, states, key, averaging)
        share = _decay_share(old, mean, averaging)
        gained = _moved_mean(old, new, mean, share, averaging)
        means = tuple(g + share * p for g, p in zip(gained, new.parameters, strict=True))
        values[key] = tuple(one * m for m in means)
        alive = [a or bool(g.any()) for a, g in zip(alive, gained, strict=True)]
    means = means if present else tuple(map(torch.zeros_like, new.parameters))
    for key in _present(states, layout.squares):
        square = _average(old, states, key, averaging, second=True)
        if samples:
            squares = _calibrated(old, new, samples, share, square)
        else:
            variance = tuple((v - m * m).clamp(min=0) for v, m in zip(square, mean, strict=True))
            spread = new.pull_squares(old.lift_squares(variance))
            squares = tuple(v + m * m for v, m in zip(spread, means, strict=True))
        pairs = zip(squares, means, strict=True)
        values[key] = tuple(torch.maximum(two * v, (one * m).square()) for v, m in pairs)
        alive = [a or bool(v.any()) for a, v in zip(alive, squares, strict=True)]
    moved = [counted | {key: part[i] for key, part in values.items()} for i in range(len(alive))]
    return [state if live else {} for state, live in zip(moved, alive, strict=True)]


def prune(
    state: Mapping[str, Any],
    share: float = 0.9,
    layout: StateLayout = AVERAGES,
) -> dict[str, Any]:
    """A parameter's state with the smallest entries of each average set to zero.

    ``keep = |m| > the share-quantile of |m|``; ``m' = keep m`` and ``v' = keep max(v, m^2)``. The
    step stays; a state without a first moment stays as it is.

    Args:
        state: of one parameter.
        share: how many of the entries become zero; ReLoRA's authors found 0.9 best.
        layout: which entries are averages, and of what.

    Example:
        >>> prune({"momentum_buffer": torch.tensor([3.0, -4.0, 1.0, 2.0])}, 0.5)
        {'momentum_buffer': tensor([ 3., -4.,  0.,  0.], dtype=torch.float64)}
    """
    pruned = dict(state)
    for key in _present([state], layout.means):
        mean = precise(state[key])
        sizes = mean.abs()
        least = sizes.flatten().kthvalue(max(1, math.ceil(share * sizes.numel()))).values
        keep = sizes > least  # one choice for both averages: an m without its v is without bound
        pruned[key] = mean * keep
        for other in _present([state], layout.squares):
            pruned[other] = torch.maximum(precise(state[other]), mean.square()) * keep
    return pruned


def check_states(path: str, states: Sequence[Mapping[str, Any]], layout: StateLayout) -> None:
    """Raise ValueError if states hold what cannot be moved, UnfitWeightError if not finite."""
    check_known(path, states, layout)
    values = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    if not all(map(all_finite, values)):
        raise UnfitWeightError(
            f"layer {path!r}: the optimizer's state holds NaN or infinite values"
        )


def check_known(path: str, states: Iterable[Mapping[str, Any]], layout: StateLayout) -> None:
    """Raise ValueError if states hold what cannot be moved."""
    held = {key: None for state in states for key, v in state.items() if v is not None}
    if unknown := [key for key in held if key not in layout.keys]:
        raise ValueError(
            f"layer {path!r}: the optimizer keeps {', '.join(unknown)}, which cannot be moved "
            f"(only {', '.join(layout.keys)} can); use moments='reset'"
        )


def settled(
    path: str, states: Sequence[tuple[Parameter, dict[str, Any]]]
) -> list[tuple[Parameter, dict[str, Any]]]:
    """These states of a layer's parameters, ``v >= m * m`` also after rounding to their dtype.

    If a value is not finite in that dtype, the layer's state is reset, with a warning.
    """
    for _, state in states:
        for key in _present([state], AVERAGES.squares) if "exp_avg" in state else ():
            state[key] = torch.maximum(state[key], _square_rounded_up(state["exp_avg"]))
    values = [v for _, state in states for v in state.values() if isinstance(v, Tensor)]
    if all(map(all_finite, values)):
        return list(states)
    warnings.warn(
        f"layer {path!r}: its optimizer state is not finite in the new form (in "
        f"{values[-1].dtype}), so it is reset",
        RuntimeWarning,
        stacklevel=6,
    )
    # Adam counts its steps from 1 then; a velocity is zero, for fused SGD wants it in all or none.
    velocities = [(p, state) for p, state in states if "step" not in state]
    return [(p, {k: torch.zeros_like(p) for k in state}) for p, state in velocities]


def _square_rounded_up(mean: Tensor) -> Tensor:
    """The least numbers of its dtype that are no smaller than its squares."""
    square = precise(mean).square()
    rounded = square.to(mean.dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(precise(rounded) < square, above, rounded)


def _present(states: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if any(s.get(key) is not None for s in states)]


def _average(
    side: Side,
    states: Sequence[Mapping[str, Any]],
    key: str,
    averaging: Averaging,
    second: bool = False,
) -> Factors:
    """The bias-corrected averages of this name, zeros where there is none."""
    found: list[Tensor] = []
    for parameter, state in zip(side.parameters, states, strict=True):
        by = averaging.corrections(state.get("step"))[second]
        there = state.get(key) is not None
        found.append(precise(state[key]) / by if there else torch.zeros_like(parameter))
    return tuple(found)


def _moved_mean(old: Side, new: Side, mean: Factors, share: float, averaging: Averaging) -> Factors:
    """J'(J+(m - c f)), with the c of Note [Weight decay]."""
    if share == 0:
        return new.pull(old.limited(old.lift(mean), mean, averaging.decay * averaging.gain))
    known = tuple(m - share * p for m, p in zip(mean, old.parameters, strict=True))
    whole = old.lift(mean) - share * old.lift(old.parameters)
    return new.pull(old.limited(whole, known, averaging.decay * averaging.gain))


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
        moved = here.pull(there.limited(there.lift(sample), sample))
        for total, g, p in zip(totals, moved, here.parameters, strict=True):
            total += (g + share * p).square()
        pairs = zip(sample, there.parameters, strict=True)
        energy += sum(float((g + share * p).square().sum()) for g, p in pairs)
    known = sum(float(v.sum()) for v in square)
    return tuple(total * (known / energy if energy > 0 else 0.0) for total in totals)
