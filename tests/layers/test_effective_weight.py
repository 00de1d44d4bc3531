"""Reading and writing the weight of a layer with factors: a write reaches the layer or raises."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import DECOMPOSITIONS, assert_close
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.forms import Form
from dynarank.layers.effective_weight import EffectiveWeight

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 10),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d-grouped": lambda: nn.Conv2d(6, 12, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "transposed-1d": lambda: nn.ConvTranspose1d(6, 8, 3),
    "transposed-2d": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
    "transposed-3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "embedding": lambda: nn.Embedding(20, 12),
    "embedding-padded": lambda: nn.Embedding(20, 12, padding_idx=3),
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4),
    "gru": lambda: nn.GRU(6, 8, bias=False),
    "rnn": lambda: nn.RNN(6, 8),
    "lstm-cell": lambda: nn.LSTMCell(6, 8),
    "gru-cell": lambda: nn.GRUCell(6, 8, bias=False),
    "rnn-cell": lambda: nn.RNNCell(6, 8),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention-apart": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=7),
}
FORMS: list[Form] = [LowRank(2), Adapted(2)]
over_layers = pytest.mark.parametrize("layer", [*LAYERS, "gpt2-conv1d"])
over_forms = pytest.mark.parametrize("form", FORMS, ids=str)


def build(layer: str, form: Form | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = {**LAYERS, "gpt2-conv1d": lambda: Conv1D(10, 12)}[layer]().double()
    if form is not None:
        model = nn.ModuleDict({"it": module})
        dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form))
        with torch.no_grad():  # no adapter is zero
            for p in module.parameters():
                p.normal_()
    return module


def weights(module: nn.Module) -> list[str]:
    return list(module.forms)  # type: ignore[arg-type]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """The layer and its parameters are the same after as before."""
    kind, held = type(module), dict(module.named_parameters())
    values, names = {name: p.detach().clone() for name, p in held.items()}, set(vars(module))
    yield
    assert type(module) is kind and set(vars(module)) == names
    assert not module._forward_pre_hooks
    after = dict(module.named_parameters())
    assert list(after) == list(held)
    assert all(after[name] is held[name] for name in held)
    assert all(torch.equal(after[name], values[name]) for name in held)


# A write that replaces all values.


def reset(module: Any) -> None:
    attention = isinstance(module, nn.MultiheadAttention)
    module._reset_parameters() if attention else module.reset_parameters()


@pytest.mark.parametrize("layer", LAYERS)
@over_forms
def test_reset_draws_what_the_plain_layer_draws(layer: str, form: Form) -> None:
    plain, module = build(layer), build(layer, form)
    for one in (plain, module):
        torch.manual_seed(5)
        reset(one)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    reset(plain)
    assert torch.equal(torch.get_rng_state(), drawn)
    fresh = nn.ModuleDict({"it": copy.deepcopy(plain)})
    if isinstance(form, LowRank):  # as a new layer that is factorized
        dr.factorize(fresh, 2, layers=list(dr.current_plan(fresh)))
    for name in weights(module):
        written, expected = getattr(module, name).detach(), getattr(fresh["it"], name).detach()
        if layer == "embedding-padded":
            assert not written[3].any()
            if isinstance(form, LowRank):  # zero in the draw, or after truncating it
                continue
        assert_close(written.clone(), expected.clone())
    for name, p in plain.named_parameters(recurse=False):
        if "bias" in name:
            assert torch.equal(getattr(module, name), p)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS[1:])
@pytest.mark.parametrize("layer", ["linear", "conv2d-grouped", "embedding-padded", "gru"])
def test_reset_in_every_decomposition(layer: str, decomposition: str) -> None:
    module = build(layer, LowRank(2, decomposition))
    before = [getattr(module, name).detach().clone() for name in weights(module)]
    reset(module)
    for name, old in zip(weights(module), before, strict=True):
        new = getattr(module, name).detach()
        assert (new - old).norm() > 0.5 * old.norm() and new.any()


INITS: dict[str, Callable[[Tensor], object]] = {
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "constant_": lambda w: nn.init.constant_(w, 0.5),
    "zeros_": nn.init.zeros_,
    "data.normal_": lambda w: w.data.normal_(),
    "detach().uniform_": lambda w: w.detach().uniform_(),
    "data[:] of zeros": lambda w: w.data.zero_(),
}


@over_layers
@over_forms
@pytest.mark.parametrize("init", INITS)
def test_an_initialization_reaches_the_layer(layer: str, form: Form, init: str) -> None:
    """Law: read again, it is what was written, truncated if low-rank."""
    module = build(layer, form)
    for name in weights(module):
        plain = torch.empty_like(getattr(build(layer), name)).contiguous()
        torch.manual_seed(1)
        INITS[init](getattr(module, name))
        torch.manual_seed(1)
        INITS[init](plain)
        expected = plain.detach()
        if isinstance(form, LowRank):
            (spec,) = (s for s in type(module).specs(module) if s.name == name)  # type: ignore[attr-defined]
            decomposition = spec.decomposition(form)
            split = decomposition.split(spec.to_canonical(expected), form.resolved_rank)
            expected = spec.from_canonical(decomposition.join(split))
        assert_close(getattr(module, name).detach().clone(), expected.clone())


def test_net_apply() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    model = dr.factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 2, layers="*")
    model.apply(init)
    assert_close(model(torch.ones(8)), torch.full((8,), 64.0))


def test_a_layer_set_to_zero_can_train_again() -> None:
    module = build("linear", LowRank(2))
    nn.init.zeros_(module.weight)  # type: ignore[arg-type]
    assert not module.weight.any()  # type: ignore[operator]
    module(torch.ones(12, dtype=torch.float64)).sum().backward()
    assert any(p.grad.any() for p in (module.down, module.up))  # type: ignore[union-attr]


@over_forms
def test_a_layer_that_has_diverged_can_be_reset(form: Form) -> None:
    module: Any = build("linear", form)
    for value in (float("nan"), float("inf")):
        for write in (reset, INITS["zeros_"], INITS["data.normal_"]):
            with torch.no_grad():
                for p in module.parameters():
                    p.fill_(value)
            write(module if write is reset else module.weight)
            assert module.weight.isfinite().all()


@over_forms
def test_on_the_meta_device(form: Form) -> None:
    module: Any = build("linear", form).to("meta")
    reset(module)
    nn.init.zeros_(module.weight)
    module.to_empty(device="cpu")
    reset(module)
    assert module.weight.isfinite().all() and module.weight.any()


def test_given_values_are_truncated_with_a_warning() -> None:
    module, value = build("linear", LowRank(2)), torch.randn(10, 12, dtype=torch.float64)
    with torch.no_grad(), pytest.warns(UserWarning, match="rank=2.*relative error of 0.*inflate"):
        module.weight.copy_(value)  # type: ignore[operator]
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    assert_close(module.weight.detach().clone(), (u[:, :2] * s[:2]) @ v[:2])  # type: ignore[operator]
    fitting = torch.ones(10, 12, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(fitting)  # type: ignore[operator]
    assert_close(module.weight.detach().clone(), fitting)  # type: ignore[operator]


# A write that changes values.

FITTING: dict[str, Callable[[Any], None]] = {
    "mul_": lambda m: m.weight.mul_(0.5),
    "data.mul_": lambda m: m.weight.data.mul_(0.5),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 0.5),
    "out=": lambda m: torch.mul(m.weight, 0.5, out=m.weight),
    "view": lambda m: m.weight.transpose(0, 1).mul_(0.5),
    "rows": lambda m: [row.mul_(0.5) for row in m.weight.unbind()],
    "row by row": lambda m: [m.weight[i].mul_(0.5) for i in range(len(m.weight))],
    "item": lambda m: m.weight.__setitem__(slice(None), m.weight * 0.5),
    "data = ": lambda m: setattr(m.weight, "data", m.weight.data * 0.5),
    "data *= ": lambda m: halve(m),
}


def halve(module: Any) -> None:
    module.weight.data *= 0.5


@pytest.mark.parametrize("layer", ["linear", "conv2d-grouped", "gpt2-conv1d", "transposed-2d"])
@over_forms
@pytest.mark.parametrize("write", FITTING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_that_fits(layer: str, form: Form, write: str, mode: Callable[[], Any]) -> None:
    module = build(layer, form)
    expected = 0.5 * module.weight.detach().clone()  # type: ignore[operator]
    with mode():
        FITTING[write](module)
    assert_close(module.weight.detach().clone(), expected)  # type: ignore[operator]
    assert not any(p.is_inference() for p in module.parameters())


LOSING: dict[str, Callable[[Any, Tensor], object]] = {
    "+=": lambda m, d: m.weight.add_(d),
    "data +=": lambda m, d: m.weight.data.add_(d),
    "data = ": lambda m, d: setattr(m.weight, "data", m.weight.data.clone() + d),
    "small": lambda m, d: m.weight.add_(1e-5 * d),
    "item": lambda m, _: m.weight.__setitem__((0, 0), 100.0),
    "clamp_": lambda m, _: m.weight.clamp_(-0.1, 0.1),
    "masked": lambda m, d: m.weight.masked_fill_(d > 0, 0.0),
    "not finite": lambda m, _: m.weight.fill_(float("nan")),
}


@pytest.mark.parametrize("write", LOSING)
def test_a_change_that_the_rank_does_not_hold_is_refused(write: str) -> None:
    module, delta = build("linear", LowRank(2)), torch.randn(10, 12, dtype=torch.float64)
    with (
        torch.no_grad(),
        untouched(module),
        pytest.raises(ValueError, match=r"rank=2.*would lose|finite"),
    ):
        LOSING[write](module, delta)


def test_a_change_to_nearly_zero_keeps_the_new_value() -> None:
    torch.manual_seed(0)
    module = dr.factorize(nn.Sequential(nn.Linear(48, 48)), 4, layers="*")[0]
    with torch.no_grad():
        with untouched(module), pytest.raises(ValueError, match=r"would lose .* of the new value"):
            module.weight.clamp_(-1e-4, 1e-4)  # type: ignore[operator]
        expected = module.weight.detach().clone() * 1e-4  # type: ignore[operator]
        module.weight.mul_(1e-4)  # type: ignore[operator]
    assert_close(module.weight.detach().clone(), expected)  # type: ignore[operator]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_writes_that_torch_does_not_count(form: Form) -> None:
    module: Any = build("linear", form)
    twice = 2 * module.weight.detach().clone()
    module.weight.data.apply_(lambda x: 2 * x)
    assert_close(module.weight.detach().clone(), twice)
    module.weight.data.map_(twice, lambda x, y: x + y)
    assert_close(module.weight.detach().clone(), 2 * twice)
    with untouched(module):
        torch.zeros_like(twice).map_(module.weight.detach(), lambda x, y: y)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_its_storage_and_the_tensor_itself_are_not_exchanged(form: Form) -> None:
    module: Any = build("linear", form)
    other = torch.zeros(10, 12, dtype=torch.float64)
    with untouched(module), torch.no_grad():
        with pytest.raises(RuntimeError, match="no storage to replace"):
            module.weight.set_(other)
        with pytest.raises(RuntimeError, match="different slots"):
            torch.utils.swap_tensors(module.weight, other)
        with pytest.raises(RuntimeError, match="different slots"):
            torch.utils.swap_tensors(other, module.weight)
    assert type(other) is Tensor


@pytest.mark.parametrize("write", [name for name in LOSING if name != "not finite"])
def test_an_adapted_layer_holds_every_change(write: str) -> None:
    module, delta = build("linear", Adapted(2)), torch.randn(10, 12, dtype=torch.float64)
    plain = nn.Linear(12, 10).double()
    with torch.no_grad():
        plain.weight.copy_(module.weight)  # type: ignore[arg-type]
        for one in (module, plain):
            LOSING[write](one, delta)
    assert torch.equal(module.weight.detach().clone(), plain.weight)  # type: ignore[operator]
    assert not module.up.any()  # type: ignore[operator]


@pytest.mark.parametrize("safe", [False, True])
def test_merging_an_adapter_of_peft(safe: bool) -> None:
    """Its two ways to write ``W + delta``, with gradients on."""

    def merge(layer: Any, delta: Tensor) -> None:
        if safe:
            merged = layer.weight.data.clone()
            merged += delta.detach()
            layer.weight.data = merged
        else:
            layer.weight.data += delta

    delta = torch.randn(10, 12, dtype=torch.float64, requires_grad=True)
    adapted = build("linear", Adapted(2))
    expected = (adapted.weight + delta).detach()  # type: ignore[operator]
    merge(adapted, delta)
    assert_close(adapted.weight.detach().clone(), expected)  # type: ignore[operator]
    low_rank = build("linear", LowRank(2))
    with untouched(low_rank), pytest.raises(ValueError, match="inflate"):
        merge(low_rank, delta)


def test_data_that_shares_memory() -> None:
    layer: Any = nn.Linear(6, 6).double()
    dr.factorize(nn.Sequential(layer), 2, layers="*")
    expected = layer.weight.detach().T.clone()
    layer.weight.data = layer.weight.data.T
    assert_close(layer.weight.detach().clone(), expected)
    held = layer.weight
    held.data = held.data.T
    assert_close(layer.weight.detach().clone(), expected.T)


def test_augmented_assignment() -> None:
    module: Any = build("linear", LowRank(2))
    expected = 2 * module.weight.detach().clone()
    with torch.no_grad():
        module.weight *= 2
    assert_close(module.weight.detach().clone(), expected)


# What is refused.


def test_a_write_that_autograd_would_record() -> None:
    for form in FORMS:
        module: Any = build("linear", form)
        with untouched(module):
            with pytest.raises(RuntimeError, match="no_grad"):
                module.weight.zero_()
            with pytest.raises(RuntimeError, match="no_grad"):
                module.weight[0] = 1.0


def test_a_reading_that_is_out_of_date() -> None:
    module: Any = build("linear", LowRank(2))
    old, model = module.weight, nn.Sequential(module)
    with torch.no_grad():
        module.up.mul_(2)
        with untouched(module), pytest.raises(RuntimeError, match="out of date"):
            old.mul_(0.5)
        old = module.weight
        dr.merge(model)
        with untouched(module), pytest.raises(RuntimeError, match="out of date"):
            old.mul_(0.5)


@over_forms
@pytest.mark.parametrize("layer", ["linear", "lstm", "gru-cell", "attention", "conv1d"])
def test_assigning_and_deleting(layer: str, form: Form) -> None:
    module: Any = build(layer, form)
    name = weights(module)[0]
    value = getattr(module, name).detach().clone()
    flat = list(getattr(module, "_flat_weights", []))
    with untouched(module):
        for other in (value, None, getattr(build(layer, form), name)):
            with pytest.raises(TypeError, match=rf"cannot assign to '{name}'.*copy_.*inflate"):
                setattr(module, name, other)
        with pytest.raises(KeyError, match=r"already exists.*inflate"):
            setattr(module, name, nn.Parameter(value))
        with pytest.raises(KeyError, match=r"already exists.*inflate"):
            module.register_parameter(name, nn.Parameter(value))
        with pytest.raises(KeyError, match="already exists"):
            module.register_buffer(name, value)
        with pytest.raises(TypeError, match="cannot delete"):
            delattr(module, name)
        with pytest.raises(TypeError, match="cannot assign"):
            torch.func.functional_call(module, {name: value}, (value,))
    assert all(a is b for a, b in zip(flat, getattr(module, "_flat_weights", []), strict=True))


def test_wrong_shapes_and_hooks() -> None:
    module: Any = build("linear", LowRank(2))
    with untouched(module):
        with pytest.raises(ValueError, match=r"\(10, 12\) in torch.float64 on cpu in this layer"):
            module.weight.data = torch.zeros(12, 10, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"got \(10, 12\) in torch.float32"):
            module.weight.data = module.weight.data.float()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            with pytest.raises(RuntimeError, match="outside of autocast"):
                build("linear", LowRank(2)).float().weight.mul_(0.5)
        with pytest.raises(ValueError, match=r"\(10, 12\) in this layer, got \(3,\)"):
            module.set_weight_("weight", torch.zeros(3))
        with pytest.raises(RuntimeError, match="inflate"):
            module.weight.register_hook(lambda gradient: gradient)
        with pytest.raises(RuntimeError, match="inflate"):
            module.weight.grad = torch.zeros(10, 12)
    with torch.no_grad(), pytest.raises(ValueError, match="read-only"):
        module.weight.numpy()[0] = 1.0


def test_freezing() -> None:
    for form, trained in zip(FORMS, [{"down", "up"}, {"down", "up"}], strict=True):
        module: Any = build("linear", form)

        def training(module: Any = module) -> set[str]:
            return {n for n, p in module.named_parameters() if p.requires_grad and n != "bias"}

        assert training() == trained
        module.weight.requires_grad_(False)
        assert training() == set() and not module.weight.requires_grad
        module.weight.requires_grad = True
        assert training() == trained
        with torch.no_grad():
            module.weight.requires_grad = False
        assert training() == set()
        probe = module.weight.detach().requires_grad_()  # of a copy of one's own
        assert probe.requires_grad and training() == set()


# It reads as a tensor.


def test_reading() -> None:
    module: Any = build("linear", LowRank(2))
    joined = module.up @ module.down
    weight, x = module.weight, torch.randn(3, 12, dtype=torch.float64)
    assert isinstance(weight, Tensor) and isinstance(weight, EffectiveWeight)
    assert torch.equal(weight, joined) and weight.requires_grad and not weight.is_leaf
    assert type(weight * 2) is Tensor and type(F.linear(x, weight)) is Tensor
    assert repr(weight) == repr(joined.clone()).replace("CloneBackward0", weight.grad_fn.name())

    def gradients(w: Tensor) -> list[Tensor]:
        factors = (module.down, module.up)
        (first,) = torch.autograd.grad(F.linear(x, w).pow(3).sum(), [w], create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), factors)]

    for a, b in zip(gradients(module.weight), gradients(module.up @ module.down), strict=True):
        assert torch.equal(a, b)


def test_copies_are_plain_tensors() -> None:
    module: Any = build("linear", Adapted(2))
    with torch.no_grad():
        weight = module.weight
        file = io.BytesIO()
        torch.save(weight, file)
        file.seek(0)
        copies = [copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(file)]
    for one in (*copies, weight.clone()):
        assert type(one) is Tensor and torch.equal(one, weight)
        with untouched(module):
            one.detach().zero_()


class Tied(nn.Module):
    """A language model's two ends: a forward pass that reads a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(20, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(x)), self.table.weight)


@over_forms
def test_a_forward_pass_that_reads_the_weight(form: Form) -> None:
    model, x = Tied(), torch.arange(6)
    dr.apply_plan(model, {"table": form, "inner": form})
    expected = model(x)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), expected)
    batch = torch.func.vmap(lambda rows: model(rows))(torch.stack([x, x]))
    assert_close(batch[1], expected)
    assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(torch.jit.trace(model, (x,))(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), expected)


@pytest.mark.parametrize("name", ["down", "up"])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "module", "attribute"])
def test_a_name_that_a_factor_would_take(name: str, kind: str) -> None:
    layer = nn.Linear(8, 8)
    value: Any = {
        "parameter": nn.Parameter(torch.ones(3)),
        "buffer": nn.Buffer(torch.ones(3)),
        "module": nn.Identity(),
        "attribute": "mine",
    }[kind]
    setattr(layer, name, value)
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"'0' has an attribute '{name}' of its own.*rename it"):
        dr.factorize(model, 2, layers="*")
    assert type(layer) is nn.Linear and getattr(layer, name) is value
