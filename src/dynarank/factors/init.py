"""Initialization of factors that matches the statistics of the full layer's initialization.

Legend: W the weight, f its factors, ``W = join(f)``; U = up, D = down of an SVD pair.

If each factor is initialized by a layer's usual rule, their product has the wrong scale, which
falls with the rank. Here the full layer is the reference: a weight is drawn by its own
``reset_parameters`` in a separate module, and the factors match its variance or spectrum.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Decomposition, Factors, precise
from dynarank.decompositions.numerics.multilinear import equal_norms
from dynarank.forms import Adapted, FullRank, LowRank
from dynarank.layers import RankedLayer
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site, survey

__all__ = [
    "balance",
    "factors_of_variance",
    "initialize_factors",
    "plain_draw",
]

_ENTRIES = 20_000  # at least this many are drawn to measure a variance, to within 1 percent
_DRAWS = 64


@torch.no_grad()
def initialize_factors(
    model: nn.Module,
    *,
    match: Literal["variance", "spectrum"] = "variance",
    seed: int | None = None,
    layers: LayerFilter = None,
    reset: Callable[[nn.Module], object] | None = None,
) -> list[str]:
    """Redraw the factors of low-rank weights in place, matching the full layer's initialization.

    ``"variance"``: Gaussian factors of equal norm, so that ``mean(join(f)^2)`` is that of the full
    layer's draw; for an SVD pair ``E[U'U] = E[D D']``. ``"spectrum"``: the best rank-r
    approximation of one draw, so that the product has exactly its r leading singular values
    (spectral initialization).

    Separate random generators are used; the global random state does not change. Optimizer states
    are not updated: initialize before training.

    Args:
        model: the model, or one ranked layer.
        match: the property of the full layer's draw to match, ``"variance"`` or ``"spectrum"``.
        seed: the seed of the draws, combined with each path; None: the run's seed.
        layers: a filter or glob patterns; None: every low-rank weight.
        reset: a function that initializes a plain module's parameters in place, for layers that
            are not initialized by ``reset_parameters``.

    Returns:
        The paths of the initialized weights.

    Raises:
        ValueError: an unknown ``match``; no low-rank weight is selected; a layer has no
            ``reset_parameters`` and ``reset`` is not given.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(64, 64)), rank=8)
        >>> initialize_factors(model, match="spectrum", seed=0)
        ['0']

    Reference:
        Khodak et al., "Initialization and Regularization of Factorized Neural Layers", arXiv
        2105.01029, 2021.
    """
    if match not in ("variance", "spectrum"):
        raise ValueError(f'match is "variance" or "spectrum", got {match!r}')
    root = torch.initial_seed() if seed is None else seed
    drawn = [
        (site, _draw(site, match, (root ^ zlib.crc32(site.path.encode())) % 2**63, reset))
        for site in _low_rank(model, layers)
    ]
    for site, factors in drawn:
        _write(site, factors)
    return [site.path for site, _ in drawn]


@torch.no_grad()
def balance(model: nn.Module, *, layers: LayerFilter = None) -> list[str]:
    """Balance the factors of all low-rank and adapted weights in place; the function is unchanged.

    ``join(balanced(f)) == join(f)``: an SVD pair gets ``U'U == D D' == diag(s)``, other chains
    factors of equal Frobenius norm. During training the norms drift apart. Optimizer states are not
    updated, so this is best done when they are small or reset.

    Args:
        model: the model.
        layers: a filter or glob patterns; None: every weight with factors.

    Returns:
        The paths of the balanced weights.

    Example:
        >>> balance(dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2))
        ['0']
    """
    sites = survey(model) if layers is None else select(survey(model), layers)
    done: list[str] = []
    for site in sites:
        if isinstance(site.form, LowRank | Adapted):
            exact = tuple(precise(f) for f in site.factors())
            _write(site, site.spec.decomposition(site.form).balanced(exact))
            done.append(site.path)
    return done


def factors_of_variance(
    decomposition: Decomposition,
    shape: tuple[int, ...],
    rank: int,
    variance: float,
    generator: torch.Generator,
) -> Factors:
    """Gaussian factors of equal norm with ``mean(join(f)^2) == variance``, in fp64.

    Args:
        decomposition: the decomposition that joins them.
        shape: the shape of the weight, (out, in / groups, *kernel).
        rank: the rank of the factors.
        variance: the variance of the weight's entries.
        generator: the random generator.
    """
    shapes = decomposition.shapes(shape, rank)
    draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    factors = equal_norms(tuple(draws))
    ratio = variance / decomposition.join(factors).square().mean().item()
    return tuple(f * ratio ** (0.5 / len(factors)) for f in factors)


def plain_draw(
    site: Site, seed: int, reset: Callable[[nn.Module], object] | None = None
) -> Iterator[Tensor]:
    """Endless draws of the canonical weight by the plain layer's initialization, in fp64.

    Args:
        site: a weight of a ranked layer, which is not modified.
        seed: the seed of the draws.
        reset: a function that initializes a plain module's parameters in place; None: its
            ``reset_parameters``.

    Raises:
        ValueError: the layer has no ``reset_parameters``.
    """
    shell = _plain_shell(site)
    reset = reset or (_own_reset if hasattr(shell, "reset_parameters") else None)
    if reset is None:
        raise ValueError(
            f"layer {site.path!r}: {type(shell).__name__} has no reset_parameters to draw its "
            "weight; pass reset=, a function that initializes a plain module's parameters"
        )
    state: Tensor | None = None
    while True:
        with torch.random.fork_rng(devices=[]):  # the draws are made on the CPU
            if state is None:
                torch.default_generator.manual_seed(seed)
            else:
                torch.set_rng_state(state)
            reset(shell)
            state = torch.get_rng_state()
        yield site.spec.to_canonical(_own(shell)[site.spec.name].detach()).clone()


def _own_reset(module: nn.Module) -> None:
    module.reset_parameters()  # pyright: ignore[reportCallIssue]


def _draw(
    site: Site, match: str, seed: int, reset: Callable[[nn.Module], object] | None
) -> Factors:
    form, draws = site.form, plain_draw(site, seed, reset)
    assert isinstance(form, LowRank)
    decomposition, rank = site.spec.decomposition(form), form.resolved_rank
    if match == "spectrum":
        return decomposition.split(next(draws), rank)
    number = min(max(1, math.ceil(_ENTRIES / math.prod(site.shape))), _DRAWS)
    variance = sum(next(draws).square().mean().item() for _ in range(number)) / number
    generator = torch.Generator().manual_seed(seed)
    return factors_of_variance(decomposition, site.shape, rank, variance, generator)


def _low_rank(model: nn.Module, layers: LayerFilter) -> list[Site]:
    sites = survey(model) if layers is None else select(survey(model), layers)
    found = [site for site in sites if isinstance(site.form, LowRank)]
    others = [site.path for site in sites if not isinstance(site.form, LowRank)]
    if not found or (layers is not None and others):
        raise ValueError(
            f"only low-rank weights have factors to initialize; not low-rank: {', '.join(others)}; "
            "factorize them first"
        )
    return found


def _plain_shell(site: Site) -> nn.Module:
    """A plain copy of the site's module with its own parameters, on the CPU in fp64."""
    assert isinstance(site.module, RankedLayer)
    shell = site.module.plain_like()
    own: dict[str, Any] = {}
    for spec in type(site.module).weights_of(site.module):
        stored = spec.from_canonical(torch.empty(spec.shape, dtype=torch.float64))
        own[spec.name] = Parameter(stored.contiguous())
    factors = {
        name
        for spec in type(site.module).weights_of(site.module)
        for name in spec.parameter_names(site.module.forms.get(spec.name, FullRank()))
    }
    for name, p in _own(site.module).items():
        if name not in factors:
            own[name] = None if p is None else Parameter(torch.empty(p.shape, dtype=torch.float64))
    shell.__dict__["_parameters"] = own
    shell.__dict__["_buffers"] = copy.deepcopy(site.module.__dict__["_buffers"])
    return shell


def _own(module: nn.Module) -> dict[str, Any]:
    return module.__dict__["_parameters"]


def _write(site: Site, factors: Factors) -> None:
    for old, new in zip(site.factors(), factors, strict=True):
        old.copy_(new)
