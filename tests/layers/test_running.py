"""A batch means one thing everywhere, and running a model on it leaves no trace."""

from __future__ import annotations

import random
from collections import UserDict, namedtuple
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import dynarank as dr
from dynarank.contrib.noise_scale import NoiseMonitor
from dynarank.cost.dry_run import dry_run
from dynarank.cost.flops import count_flops, trace
from dynarank.layers.running import call_model, forward_arguments, preserve_state
from dynarank.scheduler.batch_norm import recalibrate_batch_norms


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))


class Trace:
    """All that a pass of a model could leave behind."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, torch.get_rng_state()
        self.modes = [module.training for module in model.modules()]
        self.buffers = {n: (b, b.clone(), b._version) for n, b in model.named_buffers()}
        self.momenta = [getattr(module, "momentum", None) for module in model.modules()]
        self.grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.weights]
        self.grad_mode = torch.is_grad_enabled()

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def assert_none(self) -> None:
        assert torch.equal(torch.get_rng_state(), self.state)
        assert [module.training for module in self.model.modules()] == self.modes
        assert [getattr(m, "momentum", None) for m in self.model.modules()] == self.momenta
        assert torch.is_grad_enabled() == self.grad_mode
        assert list(self.buffers) == [name for name, _ in self.model.named_buffers()]
        for name, buffer in self.model.named_buffers():
            same, value, version = self.buffers[name]
            assert buffer is same and torch.equal(buffer, value) and buffer._version == version
        for parameter, (same, value) in zip(self.weights, self.grads, strict=True):
            assert parameter.grad is same and (value is None or torch.equal(same, value))


def used() -> nn.Sequential:
    """A model in mid-training: statistics, gradients, mixed modes."""
    model = net()
    model(torch.randn(8, 4)).sum().backward()
    model[0].bias.grad = None
    model[2].eval()
    return model


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_trace_is_left(training: bool | None, error: type[BaseException] | None) -> None:
    model = used()
    before = Trace(model)

    def fail(*_: object) -> None:
        if error is not None:
            raise error

    handle = model[3].register_forward_hook(fail)
    try:
        with preserve_state(model, training=training, grad=True):
            if training is not None:
                assert {m.training for m in model.modules()} == {training}
            assert all(p.grad is None for p in model.parameters())
            model(torch.ones(8, 4)).sum().backward()
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    else:
        assert error is None
    handle.remove()
    before.assert_none()


def test_inside_buffers_are_written_and_stay_shared() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    model[1].running_mean = model[0].running_mean
    with preserve_state(model):
        model[0](torch.ones(8, 4))
        assert model[0].num_batches_tracked == 1
        assert model[1].running_mean is model[0].running_mean and model[1].running_mean.any()
    assert model[1].running_mean is model[0].running_mean and not model[1].running_mean.any()


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed() -> None:
    model = net().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    grads = []
    for between in (False, True):
        torch.set_rng_state(state)
        model.zero_grad()
        loss = model(x).square().sum()
        if between:
            with preserve_state(model):
                model(2 * x).sum()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_draws_inside_are_those_that_would_come() -> None:
    model = net()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with preserve_state(model):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), expected)


def test_the_random_states_of_python_and_numpy_are_restored() -> None:
    random.seed(1)
    numpy.random.seed(1)
    drawn = []
    for _ in range(2):
        with preserve_state(net()):
            drawn.append((random.random(), numpy.random.rand()))
    assert drawn[0] == drawn[1]


def test_the_gradient_mode_is_the_one_asked_for() -> None:
    model = net()
    with torch.no_grad(), preserve_state(model, grad=True):
        assert model(torch.ones(8, 4)).requires_grad
    with preserve_state(model, grad=False):
        assert not model(torch.ones(8, 4)).requires_grad
    with preserve_state(model):
        assert model(torch.ones(8, 4)).requires_grad


X = torch.randn(8, 4)
RUNS = {
    "calibrate": lambda m: dr.calibrate(m, [X]),
    "recalibrate": lambda m: recalibrate_batch_norms(m, [X]),
    "noise": lambda m: NoiseMonitor(m).measure(lambda x: m(x).sum(), X.split(4), 4),
    "trace": lambda m: trace(m, X),
    "count": lambda m: count_flops(m, X),
    "dry-run": lambda m: dry_run(m, [], [{}], X, rounds=0),
}


@pytest.mark.parametrize("run", sorted(RUNS))
def test_an_interrupt_in_the_middle_leaves_no_trace(run: str) -> None:
    model = used()
    before = Trace(model)

    def interrupt(*_: object) -> None:
        torch.rand(1)
        raise KeyboardInterrupt

    handle = model[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        RUNS[run](model)
    handle.remove()
    before.assert_none()
    if run != "recalibrate":  # whose result is the running statistics
        RUNS[run](model)
        before.assert_none()


# What a batch is.


class Several(nn.Module):
    """Two arguments, the second optional."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, shift: float = 0.0) -> Tensor:
        y = self.linear(x)
        return (y if scale is None else scale * y) + shift


class Anything(nn.Module):
    def forward(self, *inputs: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, named


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


Pair = namedtuple("Pair", "x y")
LABELS = torch.zeros(8)
ONE_ARGUMENT = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "inputs-and-targets": (X, LABELS),
    "collated": next(iter(DataLoader(TensorDataset(X, LABELS), batch_size=8))),
    "three": [X, LABELS, "names"],
    "namedtuple": Pair(X, LABELS),
    "dict": {"input": X},
    "encoding": UserDict(input=X),
}


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, Wrapper, lambda m: torch.compile(m, backend="eager")],
    ids=["plain", "wrapped", "compiled"],
)
@pytest.mark.parametrize("batch", sorted(ONE_ARGUMENT))
def test_every_kind_of_batch_reaches_a_model_of_one_argument(batch: str, wrap: Any) -> None:
    model = nn.Linear(4, 3)
    assert torch.equal(call_model(wrap(model), ONE_ARGUMENT[batch]), model(X))


@given(
    positions=st.integers(0, 4),
    required=st.integers(0, 4),
    entries=st.integers(0, 6),
    kind=st.sampled_from([tuple, list]),
)
@settings(max_examples=60, deadline=None)
def test_a_sequence_gives_its_first_entries_that_bind(
    positions: int, required: int, entries: int, kind: Any
) -> None:
    required = min(required, positions)
    names = [f"a{i}" + ("" if i < required else "=None") for i in range(positions)]
    model = nn.Module()
    model.forward = eval(f"lambda {', '.join(names)}: None")
    batch = kind(range(entries))
    if entries < required:
        with pytest.raises(ValueError, match="does not take the batch"):
            forward_arguments(model, batch)
    else:
        assert forward_arguments(model, batch) == (tuple(range(entries))[:positions], {})


def test_optional_arguments_come_from_the_batch_too() -> None:
    model, scale = Several(), torch.full((8, 1), 2.0)
    assert torch.equal(call_model(model, [X, scale]), model(X, scale))
    assert torch.equal(call_model(model, (X,)), model(X))
    assert torch.equal(call_model(model, {"x": X, "shift": 1.0}), model(X, shift=1.0))
    assert forward_arguments(Anything(), [1, 2, 3]) == ((1, 2, 3), {})
    assert forward_arguments(Anything(), {"a": 1}) == ((), {"a": 1})


def test_a_packed_sequence_is_one_argument() -> None:
    packed, model = pack_sequence([torch.ones(3, 4), torch.ones(2, 4)]), nn.LSTM(4, 5)
    assert isinstance(call_model(model, packed)[0], PackedSequence)
    state = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
    assert forward_arguments(model, (packed, state)) == ((packed, state), {})


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (nn.Linear(4, 3), [], r"Linear.forward\(input.* does not take the batch \[\]: missing"),
        (nn.Linear(4, 3), {"x": X}, r"the batch \{x: Tensor\(8, 4\)\}: .*'input'; pass a tuple"),
        (Several(), {"x": X, "y": LABELS}, r"unexpected keyword argument 'y'"),
        (nn.Bilinear(4, 4, 1), [X], r"\[Tensor\(8, 4\)\]: missing a required argument: 'input2'"),
        (nn.Linear(4, 3), {0: X}, "does not take the batch"),
        (nn.Linear(4, 3), "text", r"a batch is a tensor, .* got str; pass any other object"),
        (nn.Linear(4, 3), None, "got NoneType"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(model: nn.Module, batch: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call_model(model, batch)


def test_an_error_of_the_forward_pass_itself_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_model(nn.Linear(4, 3), [torch.ones(2, 5), LABELS])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.linear(input))


@pytest.mark.parametrize("batch", sorted(ONE_ARGUMENT))
def test_everything_that_takes_a_batch_takes_each_kind(batch: str) -> None:
    given, model = ONE_ARGUMENT[batch], Normed()
    assert trace(model, given).flops({}) == count_flops(model, given) == count_flops(model, X)
    assert dr.calibrate(model, [given]).get("linear").count == 8
    recalibrate_batch_norms(model, [given])
    assert torch.allclose(model.norm.running_mean, model.linear(X).mean(0), atol=1e-6)
    assert dry_run(model, [], [{}], given, rounds=0)[0].peak_bytes > 0
    assert list(dr.plan_within(model, flops=0.9, sample=given)) == ["linear"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules_are_left_as_they_were() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4))))
    scripted[1].eval()
    model = nn.Sequential(nn.Linear(4, 4), scripted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), preserve_state(model, training=True):
        model(torch.randn(8, 4))
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [scripted[0].training, scripted[1].training] == [True, False]
