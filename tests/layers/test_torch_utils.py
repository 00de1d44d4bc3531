"""Inflated layers under torch's utilities: as the plain layer, and plain again after a merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import dynarank as dr
from dynarank.surgery.sites import survey

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Double())


APPLY: dict[str, Callable[[nn.Module, str], object]] = {
    "prune": lambda m, name: prune.l1_unstructured(m, name, 0.3),
    "prune-rows": lambda m, name: prune.ln_structured(m, name, 0.3, 2, 0),
    "weight_norm": utils.weight_norm,
    "spectral_norm": utils.spectral_norm,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": parametrized,
}
REMOVE: dict[str, Callable[[nn.Module, str], object]] = {
    "prune": prune.remove,
    "prune-rows": prune.remove,
    "weight_norm": utils.remove_weight_norm,
    "spectral_norm": utils.remove_spectral_norm,
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), "weight", (3, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), "weight", (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(9, 8), "weight", ()),
    "lstm": (lambda: nn.LSTM(8, 8, 2), "weight_hh_l0", (3, 2, 8)),
    "cell": (lambda: nn.GRUCell(8, 8), "weight_hh", (2, 8)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", (3, 2, 8)),
}
over_utilities = pytest.mark.parametrize("utility", APPLY)
over_layers = pytest.mark.parametrize("layer", LAYERS)


def run(module: nn.Module, layer: str) -> Tensor:
    torch.manual_seed(3)
    shape = LAYERS[layer][2]
    x = torch.randn(shape) if shape else torch.arange(9)
    y = module(x, x, x) if layer == "attention" else module(x)
    return y[0] if isinstance(y, tuple) else y


def pair(layer: str) -> tuple[nn.Module, nn.Sequential]:
    """A plain layer and the same, inflated."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer][0]()).eval()
    dr.inflate(dr.factorize(model, 2, layers="*"))
    return dr.merge(copy.deepcopy(model))[0], model


@over_layers
@over_utilities
def test_an_inflated_layer_is_as_the_plain_one(layer: str, utility: str) -> None:
    plain, model = pair(layer)
    name, ranked = LAYERS[layer][1], model[0]
    for one in (plain, ranked):
        torch.manual_seed(1)
        APPLY[utility](one, name)
    expected = run(plain, layer)
    assert torch.equal(run(ranked, layer), expected)
    assert list(dict(ranked.named_parameters())) == list(dict(plain.named_parameters()))
    (reason,) = {site.obstacle for site in survey(model) if site.spec.name == name}
    assert "computed from" in reason or "parametrize" in reason
    with pytest.raises(ValueError, match="undo what is in the way"):
        dr.factorize(model, 2, layers=list(_paths(model, name)))
    dr.merge(model)
    assert not isinstance(ranked, dr.layers.RankedLayer)
    assert torch.equal(run(ranked, layer), expected)
    remove = REMOVE.get(utility, parametrize.remove_parametrizations)
    for one in (plain, ranked):
        remove(one, name)
    assert type(ranked) is type(plain) and torch.equal(run(ranked, layer), run(plain, layer))
    assert ranked.state_dict().keys() == plain.state_dict().keys()


def _paths(model: nn.Module, name: str) -> list[str]:
    return [site.path for site in survey(model) if site.spec.name == name]


@pytest.mark.parametrize("utility", ["prune", "weight_norm", "parametrization"])
def test_taken_off_again_it_can_change_form(utility: str) -> None:
    _, model = pair("linear")
    APPLY[utility](model[0], "weight")
    REMOVE.get(utility, parametrize.remove_parametrizations)(model[0], "weight")
    dr.factorize(model, 2)
    assert run(model[0], "linear").shape == (3, 8)


@pytest.mark.parametrize(("layer", "factored"), [("attention", "*out_proj"), ("lstm", "*hh_l1")])
def test_beside_a_weight_with_factors(layer: str, factored: str) -> None:
    """A pruned weight of a layer, another weight of which has factors."""
    _, model = pair(layer)
    dr.factorize(model, 2, layers=factored)
    name = LAYERS[layer][1]
    prune.l1_unstructured(model[0], name, 0.5)
    mask = getattr(model[0], f"{name}_mask")
    expected = run(model[0], layer)
    prune.remove(model[0], name)
    assert torch.equal(getattr(model[0], name) == 0, mask == 0)
    assert torch.allclose(run(model[0], layer), expected)


@over_layers
@over_utilities
def test_a_layer_with_factors_is_left_as_it_is(layer: str, utility: str) -> None:
    _, model = pair(layer)
    dr.factorize(model, 2, layers="*")
    module: Any = model[0]
    names, state = set(vars(module)), copy.deepcopy(module.state_dict())
    with pytest.raises((KeyError, TypeError, ValueError), match=LAYERS[layer][1]):
        APPLY[utility](module, LAYERS[layer][1])
    assert set(vars(module)) == names and not module._forward_pre_hooks
    assert state.keys() == module.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), module.state_dict().values(), strict=True)
    )


def test_moving_and_converting() -> None:
    plain, model = pair("linear")
    held = model[0].weight
    model.double().share_memory()
    assert model[0].weight is held and held.dtype is torch.float64 and held.is_shared()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(run(model[0], "linear"), run(plain, "linear"))
