"""How an averaged copy of a model (EMA, SWA) changes form with it, in the model's own basis.

Legend: W the model's weight before a change, A the average's; f the model's new factors, ``up`` the
last of them, R their join with a unit ``up``, so that ``join(f) = up R`` (``R = down`` for an SVD).

The factors of two truncations do not mix: each has a basis of its own. So the average gets the
model's factors, the last one as ``up + (A - W) R^+``: for an SVD that is ``A down^+``. An average
equal to the model stays equal to it, also where activations chose the basis; what is lost is what
the basis does not hold of A - W. Inflated, it is A. Adapted, its base is A, under the model's
adapter: as ``A <- d A + (1 - d) W`` goes on for every parameter, frozen ones included, the base
goes to the model's just as the average of the effective weights would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dynarank.decompositions import UnfitWeightError, all_finite, precise
from dynarank.decompositions.truncation import ActivationStats
from dynarank.forms import Adapted, Change, FullRank, same_weight
from dynarank.surgery.bias import bias_shift
from dynarank.surgery.edit import Edit, check_names, check_replaceable, like_old
from dynarank.surgery.selection import find_sites
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.unfit import UnfitLayers

__all__ = ["average_edits"]


@torch.no_grad()
def average_edits(
    edits: Iterable[Edit],
    averages: Iterable[nn.Module],
    calibration: Mapping[str, ActivationStats] | None = None,
) -> list[Edit]:
    """The changes of averaged copies of a model that go with these changes of it.

    Args:
        edits: the model's, prepared and not committed; one of no parameters stands for a weight
            that stays as it is, which the averages are brought to.
        averages: copies of the model, in any forms and on any device.
        calibration: the activation statistics of the model's truncations.

    Raises:
        ValueError: a copy has not the model's weights.
        UnfitWeightError: an average is not finite, or is too large for its dtype.
    """
    edits, unfit, made = list(edits), UnfitLayers(), list[Edit]()
    for one in averages if edits else ():
        sites = find_sites(one, survey(one), [edit.site.path for edit in edits])
        for edit in edits:
            with unfit.layer(path := edit.site.path):
                made.append(_edit(edit, sites[path], (calibration or {}).get(path)))
    unfit.check()
    return made


def _edit(edit: Edit, site: Site, activity: ActivationStats | None) -> Edit:
    """The change of an average's weight that goes with one of the model's."""
    after, old = edit.change.after, site.parameters()
    assert site.form is not None
    change = Change(site.path, site.form, after, 0.0)
    if edit.site.form != after and not edit.new and same_weight(site.form, after):
        return Edit(site, change, {}, {})
    check_replaceable(site.path, old)
    check_names(site, after)
    if not all(map(all_finite, old.values())):
        raise UnfitWeightError(f"layer {site.path!r}: its average holds NaN or infinite values")
    average = site.exact()
    new = new_parameters(site, _values(edit, site, average))
    if not all(map(all_finite, new.values())):
        dtype = next(iter(new.values())).dtype
        raise UnfitWeightError(f"layer {site.path!r}: its average is too large for {dtype}")
    if edit.shift is None:
        return Edit(site, change, old, new, made_by=edit.made_by)
    left = average - site.spec.to_canonical(site.spec.effective(after, _precise(new)))
    shift = bias_shift(site, _shift(edit.shift, left, activity))
    return Edit(site, change, old, new, shift, made_by=edit.made_by)


def _values(edit: Edit, site: Site, average: Tensor) -> dict[str, Tensor]:
    """The average's new parameters by name; ``average`` is its weight, canonical, in fp64."""
    after, spec = edit.change.after, site.spec
    whole = spec.from_canonical(average)
    if isinstance(after, FullRank):
        return {spec.name: like_old(whole, spec.name, site, after).clone()}
    given = edit.new or edit.site.parameters()
    # In the average's dtype from here on: it is that basis which the last factor is fitted to.
    values = {n: like_old(p, n, site, after).clone() for n, p in given.items()}
    if isinstance(after, Adapted):
        base = next(name for name in values if spec.is_base(name))
        return {**values, base: like_old(whole, base, site, after).clone()}
    change = average - edit.site.exact().to(average.device)
    *_, last = values
    factors = spec.factors(after, _precise(values))
    up = factors[-1] + spec.decomposition(after).fit_up(factors, change)
    return {**values, last: like_old(up, last, site, after).clone()}


def _shift(shift: Tensor, left: Tensor, activity: ActivationStats | None) -> Tensor:
    """The change of the average's bias, ``(A - A') E[x]``; the model's if only E[y] is known."""
    if activity is None or activity.mean is None or activity.side != "input":
        return shift
    means: Sequence[Tensor] = precise(activity.mean).to(left.device).unbind()
    parts = zip(left.flatten(1).chunk(len(means)), means, strict=True)
    return torch.cat([part @ mean for part, mean in parts])


def _precise(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: precise(p) for name, p in parameters.items()}
