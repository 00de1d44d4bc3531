"""What training loops use goes on through every change of form."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from covering import over
from laws import DECOMPOSITIONS, LAYERS, LayerCase, assert_close, fitting, randomize
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form
from dynarank.surgery.sites import Site, survey

F64 = torch.float64
NAMES = ["linear", "linear-tall", "conv-tall", "conv-grouped", "transposed-2d", "gpt2-conv1d"]
FEW = [case for case in LAYERS if case.name in NAMES]
FORMS: list[Form] = [f for d in DECOMPOSITIONS for f in (LowRank(3, d), Adapted(3, d, alpha=6.0))]
# Factorize, inflate, deflate to adapted, restart, inflate, deflate to low-rank, another rank, and
# up: after the last a merge.
PATH: list[Form] = [
    LowRank(4),
    FullRank(),
    Adapted(3),
    Adapted(3, restart=1),
    FullRank(),
    LowRank(4),
    LowRank(2),
    FullRank(),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def changes(model: nn.Module, optimizer: Any) -> Iterator[Form | None]:
    """Each form of the path, once the model has it; None after the merge."""
    for form in PATH:
        dr.apply_plan(model, {"0": form, "2": form}, optimizer=optimizer)
        yield form
    dr.merge(model, optimizer=optimizer)
    yield None


def backward(model: nn.Module, x: Tensor) -> None:
    (model(x) + 0.1).square().mean().backward()


def site(model: nn.Module) -> Site:
    (one,) = survey(model)
    return one


def pulled(model: nn.Module, gradient: Tensor) -> list[Tensor]:
    parameters = site(model).trained()
    return list(torch.autograd.grad((site(model).effective() * gradient).sum(), parameters))


# Gradients, and their accumulation.


@over({"case": FEW, "form": FORMS})
def test_to_factors_a_gradient_moves_exactly(case: LayerCase, form: Form) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    backward(model, torch.randn(case.shape, dtype=F64))
    whole = site(model).trained()[0].grad
    assert whole is not None
    gradient = site(model).spec.to_canonical(whole)
    dr.apply_plan(model, {site(model).path: fitting(model, form)})
    for p, expected in zip(site(model).trained(), pulled(model, gradient), strict=True):
        assert p.grad is not None
        assert_close(p.grad, expected)


@over({"case": FEW, "form": FORMS})
def test_from_factors_what_they_know_of_a_gradient_moves(case: LayerCase, form: Form) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    dr.apply_plan(model, {site(model).path: fitting(model, form)})
    randomize(model)
    known = site(model)
    backward(model, torch.randn(case.shape, dtype=F64))
    before = [p.grad for p in known.trained()]
    parameters = known.trained()
    weight = known.effective()
    dr.inflate(model)
    lifted = site(model).trained()[0].grad
    assert lifted is not None
    gradient = site(model).spec.to_canonical(lifted)
    again = torch.autograd.grad((weight * gradient).sum(), parameters)
    for actual, expected in zip(again, before, strict=True):
        assert expected is not None
        assert_close(actual, expected, 1e-8)


def test_an_accumulation_goes_on_through_a_change_that_keeps_the_function() -> None:
    """Two halves of a batch, the change between them: the gradients of both after it."""
    x = torch.randn(8, 12, dtype=F64)
    model, twin = network().to(F64), network().to(F64)
    backward(model, x[:4])
    for one in (model, twin):
        dr.apply_plan(one, {"0": Adapted(3), "2": Adapted(3)})
    backward(model, x[4:])
    for half in (x[:4], x[4:]):
        backward(twin, half)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
        if p.grad is not None and q.grad is not None:
            assert_close(p.grad, q.grad)


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    model = network()
    model[0].weight.grad = torch.full((16, 12), torch.inf)
    for form in (LowRank(3), FullRank()):
        dr.apply_plan(model, {"0": form})
        assert all(p.grad is not None and p.grad.isnan().any() for p in trained(model))


def trained(model: nn.Sequential) -> list[nn.Parameter]:
    return [p for p in model[0].parameters() if p is not model[0].bias]


def test_no_gradient_stays_none_and_zero_stays_zero() -> None:
    model = network()
    dr.apply_plan(model, {"0": LowRank(3)})
    assert all(p.grad is None for p in trained(model))
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    dr.apply_plan(model, {"0": Adapted(2)})
    grads = [p.grad for p in trained(model) if p.requires_grad]
    assert len(grads) == 2 and all(g is not None and not g.any() for g in grads)
    assert model[0].base.grad is None


def test_a_rejected_change_leaves_the_gradients() -> None:
    model, x = network(), torch.randn(4, 12)
    backward(model, x)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = [(p, p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with pytest.raises(dr.UnfitWeightError):
        dr.apply_plan(model, {"0": LowRank(3), "2": LowRank(3)})
    for (old, grad, kept), p in zip(before, model.parameters(), strict=True):
        assert p is old and p.grad is grad and torch.equal(grad, kept)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_zero_grad_after_a_change_clears_what_the_change_moved(by: str, to_none: bool) -> None:
    """A step, a change and a cleared gradient: as if the gradient had been cleared before."""
    ends: list[list[Tensor]] = []
    for first in (True, False):
        model, x = network(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
        optimizer = sgd(model)
        clear = (model if by == "model" else optimizer).zero_grad
        for form in PATH:
            backward(model, x)
            optimizer.step()
            if first:
                clear(set_to_none=to_none)
            dr.apply_plan(model, {"0": form, "2": form}, optimizer=optimizer)
            clear(set_to_none=to_none)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


# Learning-rate schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda t: 0.9, lambda t: 0.8]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 9)], [5]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=6),
}


def test_every_lr_scheduler_of_torch_is_tried() -> None:
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert kinds - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


def in_groups(model: nn.Sequential) -> torch.optim.Optimizer:
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.05},
        {"params": [model[2].bias, model[2].weight], "lr": 0.02, "weight_decay": 1e-3},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_of_learning_rates_notices_no_change(kind: str) -> None:
    """Rates, momenta and the scheduler's own state, step by step; a new group joins at the end."""
    traces: list[list[Any]] = []
    for changing in (True, False):
        model, x = network(), torch.randn(4, 12)
        optimizer = in_groups(model)
        scheduler = SCHEDULERS[kind](optimizer)
        trace: list[Any] = []
        walk = changes(model, optimizer) if changing else (None for _ in [*PATH, None])
        for _ in walk:
            for _ in range(2):
                optimizer.zero_grad()
                backward(model, x)
                optimizer.step()
                scheduler.step(*[1.0] * (kind == "ReduceLROnPlateau"))
                groups = optimizer.param_groups
                trace.append([{k: v for k, v in g.items() if k != "params"} for g in groups])
                trace.append(list(getattr(scheduler, "base_lrs", [])))
                trace.append(list(scheduler.get_last_lr()))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.3})
        trace.append([g["lr"] for g in optimizer.param_groups])
        traces.append(trace)
    assert traces[0] == traces[1]


def test_a_group_added_after_a_change_trains_and_changes_with_its_layer() -> None:
    model = network()
    optimizer = sgd(model)
    dr.apply_plan(model, {"0": LowRank(3)}, optimizer=optimizer)
    model.append(nn.Linear(10, 10))
    optimizer.add_param_group({"params": [*model[3].parameters()], "lr": 0.01})
    for form in PATH:
        optimizer.zero_grad()
        backward(model, torch.randn(4, 12))
        optimizer.step()
        dr.apply_plan(model, {"0": form, "3": form}, optimizer=optimizer)
        held = {id(p) for p in optimizer.param_groups[1]["params"]}
        assert held == {id(p) for p in model[3].parameters() if p.requires_grad}


# A gradient scaler.


def test_steps_that_the_scaler_skips_change_nothing_around_a_change() -> None:
    """An overflow before each change: the step is skipped, the scale halved, training goes on."""
    model, x = network(), torch.randn(4, 12)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def step(overflow: bool) -> None:
        optimizer.zero_grad()
        loss = (model(x) + 0.1).square().mean() * (torch.inf if overflow else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for form in changes(model, optimizer):
        scale, old = scaler.get_scale(), [p.detach().clone() for p in model.parameters()]
        step(overflow=True)
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)), form
        for _ in range(2):  # a new adapter's down moves from the second on
            step(overflow=False)
        assert all(
            not torch.equal(p, q)
            for p, q in zip(model.parameters(), old, strict=True)
            if p.requires_grad
        ), form


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("overflow", [True, False])
def test_a_change_between_backward_and_a_scaled_step(unscaled: bool, overflow: bool) -> None:
    """The step is that of the moved gradients, unscaled; after an overflow there is none."""
    model, twin = network().to(F64), network().to(F64)
    optimizer, other = sgd(model), sgd(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 12, dtype=F64)
    loss = (model(x) + 0.1).square().mean() * (torch.inf if overflow else 1)
    scaler.scale(loss).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    backward(twin, x)
    plan = {"0": Adapted(3), "2": LowRank(3)}
    for one, its in ((model, optimizer), (twin, other)):
        dr.apply_plan(one, plan, optimizer=its)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (512 if overflow else 1024)
    if not overflow:
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q)


# Averages of the weights.


def test_an_average_of_merged_copies_is_that_of_the_weights() -> None:
    model, x = network().to(F64), torch.randn(4, 12, dtype=F64)
    optimizer, ema = sgd(model), get_ema_multi_avg_fn(0.5)
    averaged = AveragedModel(model, multi_avg_fn=ema)
    averaged.update_parameters(model)
    expected = {one.path: one.effective().detach().clone() for one in survey(model)}
    for _ in changes(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            averaged.update_parameters(dr.merge(copy.deepcopy(model)))
            for one in survey(model):
                expected[one.path].lerp_(one.effective().detach(), 0.5)
    for one in survey(averaged.module):
        assert_close(one.effective().detach(), expected[one.path])


# Hooks and checkpointing.


def test_hooks_run_once_a_pass_in_every_form() -> None:
    model, x = network(), torch.randn(4, 12, requires_grad=True)
    optimizer, calls = sgd(model), list[str]()
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
        layer.register_forward_hook(lambda *_: calls.append("forward"))
        layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    for form in changes(model, optimizer):
        calls.clear()
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
        assert sorted(calls) == sorted(["pre", "forward", "backward pre", "backward"] * 2), form


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients_in_every_form(reentrant: bool) -> None:
    model = network().to(F64)
    x, optimizer = torch.randn(4, 12, dtype=F64, requires_grad=True), sgd(model)
    for form in changes(model, optimizer):
        found: list[list[Tensor | None]] = []
        for checkpointed in (True, False):
            optimizer.zero_grad()
            hidden = model[0](x)
            if checkpointed:
                hidden = checkpoint(model[0], x, use_reentrant=reentrant)
            (model[2](hidden.tanh()) + 0.1).square().mean().backward()
            found.append([p.grad for p in model.parameters()])
        for one, two in zip(*found, strict=True):
            assert (one is None) == (two is None), form
            assert one is None or two is None or torch.equal(one, two), form
        optimizer.step()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointing_transformer_trains_on(reentrant: bool) -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=11,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model, tokens = BertModel(config).double().train(), torch.randint(0, 11, (2, 5))
    optimizer = sgd(model)
    for form in (LowRank(3), FullRank(), Adapted(2), LowRank(2)):
        paths = [one.path for one in survey(model) if "dense" in one.path and not one.obstacle]
        dr.apply_plan(model, dict.fromkeys(paths, form), optimizer=optimizer)
        found: list[list[Tensor | None]] = []
        for how in (True, False):
            if how:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_disable()
            optimizer.zero_grad()
            model(tokens).last_hidden_state.square().mean().backward()
            found.append([p.grad for p in model.parameters()])
        for one, two in zip(*found, strict=True):
            assert one is None or two is None or torch.equal(one, two), form
        optimizer.step()
