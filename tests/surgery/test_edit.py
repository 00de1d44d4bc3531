"""What one change keeps and loses: updates rounded away, dtypes, overflow, biases, odd memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, UnfitWeightError
from dynarank.decompositions.truncation import ActivationStats
from dynarank.forms import Form

# What rounding takes of an update.


def learned(dtype: torch.dtype, size: float, make: Callable[[], nn.Module]) -> nn.Sequential:
    """A model whose adapter has learned an update of this size relative to the weight."""
    torch.manual_seed(0)
    model = dr.deflate(nn.Sequential(make()).to(dtype), 4, layers="*")
    with torch.no_grad():
        for one in ("up", "down"):
            model[0].get_parameter(one).normal_()
        update = model[0].effective_weight() - model[0].base
        model[0].up.mul_(size * model[0].base.norm() / update.norm())
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 64),
    "conv": lambda: nn.Conv2d(16, 16, 3),
    "transposed": lambda: nn.ConvTranspose1d(16, 32, 4),
    "grouped": lambda: nn.Conv1d(32, 32, 4, groups=2),
    "embedding": lambda: nn.Embedding(64, 64),
    "conv1d-hf": lambda: Conv1D(64, 64),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("after", [FullRank(), Adapted(4, restart=1), Adapted(6)], ids=str)
def test_an_update_that_bf16_cannot_hold_is_reported(make: str, after: Form) -> None:
    model = learned(torch.bfloat16, 4e-4, MAKERS[make])
    base, exact = model[0].base.double(), learned_in_fp64(model)
    with pytest.warns(RuntimeWarning, match=r"rounds away more than 10% .* at '0'.*unmerged"):
        (change,) = dr.apply_plan(model, {"0": after})
    written = model[0].weight if isinstance(after, FullRank) else model[0].base
    lost = (written.double() - exact).norm() / (exact - base).norm()
    assert change.update_error == pytest.approx(lost.item(), rel=1e-6)
    assert change.update_error > 0.5 and change.error < 1e-3
    assert written.dtype == torch.bfloat16


def learned_in_fp64(model: nn.Sequential) -> Tensor:
    return copy.deepcopy(model).double()[0].effective_weight().detach()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4e-4), (torch.float32, 1e-9), (torch.bfloat16, 0.3)]
)
def test_an_update_that_is_kept_gives_no_warning(dtype: torch.dtype, size: float) -> None:
    model = learned(dtype, size, MAKERS["linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (change,) = dr.apply_plan(model, {"0": FullRank()})
    assert change.update_error is not None
    assert change.update_error < 0.05 or size < 1e-8


def test_only_a_merged_adapter_has_an_update() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    plans = (LowRank(2), FullRank(), Adapted(2), LowRank(2))
    changes = [dr.apply_plan(model, {"0": form})[0] for form in plans]
    assert [change.update_error for change in changes] == [None] * 4
    (change,) = dr.apply_plan(dr.deflate(nn.Sequential(nn.Linear(8, 8)), 2), {"0": FullRank()})
    assert change.update_error == 0  # nothing learned, nothing lost


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model = learned(torch.bfloat16, 4e-4, MAKERS["linear"])
    base = model[0].base
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            dr.merge(model)
    assert model[0].base is base and dr.current_plan(model) == {"0": Adapted(4)}


def test_factors_and_base_keep_their_own_dtypes() -> None:
    """fp32 adapters on a bf16 model: restarted in fp32, merged in bf16."""
    model = dr.deflate(nn.Sequential(nn.Linear(16, 16)).bfloat16(), 2, layers="*")
    for name in ("down", "up"):
        model[0].get_parameter(name).data = model[0].get_parameter(name).data.float()
    for form in (Adapted(2, restart=1), Adapted(3)):
        dr.apply_plan(model, {"0": form})
        dtypes = {n: p.dtype for n, p in model[0].named_parameters() if n != "bias"}
        assert dtypes == {"base": torch.bfloat16, "down": torch.float32, "up": torch.float32}
    low, full = (copy.deepcopy(model) for _ in range(2))
    dr.apply_plan(low, {"0": LowRank(2)})
    assert low[0].up.dtype == low[0].down.dtype == torch.float32
    assert dr.merge(full)[0].weight.dtype == torch.bfloat16


def test_a_merged_weight_is_split_in_fp32() -> None:
    """Adapted -> low-rank of a bf16 model with fp32 factors: no rounding to bf16 on the way."""
    model = learned(torch.bfloat16, 1e-3, MAKERS["linear"])
    for name in ("down", "up"):
        model[0].get_parameter(name).data = model[0].get_parameter(name).data.float()
    weight = learned_in_fp64(model)
    dr.apply_plan(model, {"0": LowRank(64)})
    joined = model[0].up.double() @ model[0].down.double()
    assert (joined - weight).norm() / weight.norm() < 1e-5


@pytest.mark.parametrize("after", [FullRank(), LowRank(2), Adapted(2, restart=1)], ids=str)
def test_what_overflows_fp16_is_refused(after: Form) -> None:
    model = dr.deflate(nn.Sequential(nn.Linear(8, 8)).half(), 2, layers="*")
    with torch.no_grad():
        model[0].up.fill_(6e4), model[0].down.fill_(6e4)
    base = model[0].base
    with pytest.raises(UnfitWeightError, match=r"'0'.* too large for torch.float16.*as it was"):
        dr.apply_plan(model, {"0": after})
    assert model[0].base is base


# Biases.


class Shared(nn.Module):
    """Layers of which one has a bias like any other, and one a bias that is not its own."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.other = make(), make()


def _share(model: Shared) -> None:
    model.register_module("third", copy.deepcopy(model.own))
    model.third.bias = model.other.bias  # type: ignore[union-attr]


def _view(model: Shared) -> None:
    memory = torch.cat([torch.zeros(3), model.other.bias.detach()])  # type: ignore[arg-type]
    model.register_parameter("memory", nn.Parameter(memory))
    model.other.bias = nn.Parameter(model.memory.detach()[3:])  # type: ignore[union-attr]


def _buffer(model: Shared) -> None:
    model.register_buffer("seen", model.other.bias.detach())  # type: ignore[union-attr]


def _freeze(model: Shared) -> None:
    model.other.bias.requires_grad_(False)  # type: ignore[union-attr]


def _prune(model: Shared) -> None:
    prune.random_unstructured(model.other, "bias", 0.5)


def _tie(model: Shared) -> None:
    model.register_module("third", copy.deepcopy(model.own))
    model.third.weight = model.other.weight  # type: ignore[union-attr]


BIASES = {
    "a bias tied to third.bias": _share,
    "a bias tied to memory": _view,
    "a bias tied to seen": _buffer,
    "a frozen bias": _freeze,
    "no bias of its own": _prune,
    "a weight that other layers share": _tie,
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 9), (40, 6)),
    "conv": (lambda: nn.Conv1d(6, 8, 3, groups=2), (20, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(6, 8, 3, groups=2), (20, 6, 7)),
    "conv1d-hf": (lambda: Conv1D(9, 6), (40, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("why", BIASES)
def test_a_bias_that_is_not_the_layers_alone_stays(why: str, layer: str) -> None:
    """And the weight is then the best one without its help."""
    make, shape = LAYERS[layer]
    model, x = Shared(make).double(), torch.randn(shape, dtype=torch.float64) + 3
    calibration = dr.calibrate(
        model, [x], layers=["own", "other"], forward=lambda m, x: (m.own(x), m.other(x))
    )
    plain = dr.factorize(copy.deepcopy(model), 2, layers="other")
    BIASES[why](model)
    kept = {n: t.clone() for n, t in model.state_dict().items() if "weight" not in n}
    moved = model.own(x).mean(), model.other(x)
    with pytest.warns(RuntimeWarning, match=rf"does not move these biases.*: other \({why}"):
        dr.factorize(model, 2, layers=["own", "other"], calibration=calibration)
    changed = {n for n, t in kept.items() if not torch.equal(t, model.state_dict()[n])}
    assert changed == {"own.bias"}
    assert torch.allclose(model.own(x).mean(), moved[0])
    if why != "no bias of its own":
        errors = [(one.other(x) - moved[1]).square().sum() for one in (model, plain)]
        assert errors[0] <= errors[1]


def test_statistics_for_weights_without_a_bias_of_that_name() -> None:
    """Your own statistics of a recurrent layer or of attention: no bias can be moved."""
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 6), "attention": nn.MultiheadAttention(6, 1)})
    mean = torch.ones(1, 6, dtype=torch.float64)
    activity = ActivationStats("input", torch.eye(6, dtype=torch.float64)[None], 9, mean)
    paths = ["lstm.weight_ih_l0", "attention.in_proj_weight"]
    biases = {n: p.clone() for n, p in model.named_parameters() if "bias" in n}
    with pytest.warns(RuntimeWarning, match="no bias of its own"):
        dr.apply_plan(
            model, {p: LowRank(2) for p in paths}, calibration=dict.fromkeys(paths, activity)
        )
    assert all(torch.equal(p, biases[n]) for n, p in model.named_parameters() if n in biases)


def test_a_plan_that_does_not_truncate_says_nothing_of_biases() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(9, 6)
    model.requires_grad_(False)
    calibration = dr.calibrate(model, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dr.apply_plan(model, {"0": Adapted(2), "1": LowRank(2, "tucker")}, calibration=calibration)


def test_a_bias_that_would_overflow_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).half()
    nn.init.constant_(model[0].bias, 6e4)
    mean = torch.full((1, 6), 6e4, dtype=torch.float64)
    activity = ActivationStats("output", torch.eye(6, dtype=torch.float64)[None], 9, mean)
    with pytest.raises(UnfitWeightError, match=r"its bias would hold .* torch\.float16"):
        dr.apply_plan(model, {"0": LowRank(1)}, calibration={"0": activity})
    assert model[0].bias.isfinite().all() and type(model[0]) is nn.Linear


def test_the_bias_of_a_pruned_layer_is_no_output_of_the_weight() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(50, 6, dtype=torch.float64)
    plain = dr.calibrate(model, [x])["0"].uncentered().second
    prune.random_unstructured(model[0], "bias", 0.5)
    assert torch.allclose(dr.calibrate(model, [x])["0"].second, plain)


# Weights in memory of an odd kind.


def test_parameters_made_in_inference_mode_become_ones_that_train() -> None:
    for form in (LowRank(2), Adapted(2)):
        with torch.inference_mode():
            model = nn.Sequential(nn.Linear(8, 8))
        dr.apply_plan(model, {"0": form})
        model(torch.randn(4, 8)).sum().backward()
        assert model[0].up.grad.any()


def test_views_are_tied_only_where_they_overlap() -> None:
    memory = torch.randn(16, 8)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    for layer, start in zip(model, (0, 8, 4), strict=True):
        layer.weight = nn.Parameter(memory[start : start + 8])
    sites = {site.path: site.obstacle for site in dr.survey(model)}
    assert sites["0"] == "its weight is tied to 2.weight"
    del model[2]
    assert [site.obstacle for site in dr.survey(model)] == ["", ""]  # a flat buffer
    model[0].register_buffer("transposed", model[0].weight.detach().T)
    assert dr.survey(model)[0].obstacle == "its weight is tied to 0.transposed"


def test_expanded_and_computed_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    y = model(torch.ones(8))
    assert torch.allclose(dr.merge(dr.deflate(model, 2, layers="*"))(torch.ones(8)), y)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0]._parameters["weight"] = model[0].weight * 2
    with pytest.raises(ValueError, match="'0': its weight is computed from other tensors"):
        dr.factorize(model, 2, layers="*")
