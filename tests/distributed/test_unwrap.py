"""Models and optimizers that come in wrappers: torch's, Accelerate's and Lightning's."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import dynarank as dr
from dynarank import LowRank, RankScheduler, Recorder
from dynarank.distributed.unwrap import unwrapped
from dynarank.forms import FullRank
from dynarank.schedules import dynamic_rank

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile


class _FabricModule(nn.Module):
    """As Lightning Fabric's, which also keeps the module that it was given."""

    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module
        self._original_module = unwrapped(forward_module)

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "fabric": _FabricModule,
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
    "data parallel compiled": lambda model: nn.DataParallel(compiled(model)),
    "fabric compiled": lambda model: _FabricModule(compiled(nn.DataParallel(model))),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(step: int = 0) -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(step))


@wrappers
def test_every_verb_takes_the_wrapped_model_and_returns_it(wrap: Any) -> None:
    model = net()
    outer = wrap(model)
    assert unwrapped(outer) is model
    assert [site.path for site in dr.survey(outer)] == ["0", "2"]
    assert dr.factorize(outer, 2, layers="0") is outer
    assert dr.current_plan(outer) == dr.current_plan(model)
    assert dr.inflate(outer) is outer
    calibration = dr.calibrate(outer, [batch()])
    assert calibration.get("0") is not None
    low = dr.deflate(outer, to="low-rank", layers="0", calibration=calibration)
    assert low is outer and dr.current_plan(model)["0"] == LowRank(2)
    assert [c.path for c in dr.apply_plan(outer, {"0": FullRank()})] == ["0"]
    dr.check(outer, SGD(model.parameters(), 0.1))
    assert outer(batch()).shape == (8, 4)
    estimate = dr.estimate(outer, batch(), schedule=dynamic_rank(2), total_steps=9, layers="0")
    assert estimate.layers == ("0",) or list(estimate.layers) == ["0"]
    assert dr.merge(outer) is outer and type(model[0]) is nn.Linear


@wrappers
def test_a_run_is_the_same_in_wrappers_bit_by_bit(wrap: Any, tmp_path: Any) -> None:
    def run(wrap: Any) -> list[Any]:
        model = net()
        outer = wrap(model)
        optimizer = SGD(outer.parameters(), 0.1, momentum=0.9)
        schedule = dynamic_rank(2, inflate=2, deflate=4, to="low-rank")
        ranks = RankScheduler(outer, optimizer, schedule, 6, layers="0")
        assert ranks.model is model and ranks.layers == ("0",)
        for step in range(6):
            outer(batch(step)).square().mean().backward()
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
        dr.check(outer, optimizer, ranks=ranks)
        return [p.tolist() for p in model.parameters()]

    assert run(wrap) == run(WRAPPERS["none"])


@wrappers
def test_a_state_in_wrappers_brings_the_forms(wrap: Any) -> None:
    saved = dr.factorize(net(), 2, layers="0").state_dict()
    model = dr.factorize(net(), 4, layers="0")
    outer = wrap(model)
    dr.inflate(outer)
    unwrapped(outer).load_state_dict(saved)
    assert dr.current_plan(outer)["0"] == LowRank(2)


def test_a_recorder_sees_the_model_inside(tmp_path: Any) -> None:
    outer = nn.DataParallel(dr.factorize(net(), 2, layers="0"))
    optimizer = SGD(outer.parameters(), 0.1)
    with Recorder(tmp_path / "r", model=outer, optimizer=optimizer, report=False) as recorder:
        assert recorder.model is outer.module
        outer(batch()).sum().backward()
        optimizer.step()
        recorder.log(loss=1.0)
        recorder.epoch(test_loss=1.0)


@pytest.mark.parametrize(
    ("name", "way_out"), [("FullyShardedDataParallel", "fully_shard"), ("DeepSpeedEngine", "DDP")]
)
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_that_flatten_parameters_are_refused(
    name: str, way_out: str, inside: bool
) -> None:
    class Base(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = self._fsdp_wrapped_module = module

    model = net()
    outer: nn.Module = type(name, (Base,), {})(model)
    if inside:
        outer = nn.Sequential(outer)
    before = dr.current_plan(model)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=f"wrapped by {name}.*{way_out}"):
        dr.factorize(outer, 2, layers="*")
    with pytest.raises(ValueError, match=f"wrapped by {name}.*{way_out}"):
        RankScheduler(outer, optimizer, dynamic_rank(2), 9, layers="*")
    assert dr.current_plan(model) == before and not optimizer._optimizer_step_post_hooks


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_model_and_optimizer_with_accumulation(precision: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=3)
    core = net()
    model, optimizer = accelerator.prepare(core, SGD(core.parameters(), 0.1, momentum=0.9))
    outer = compiled(model)
    rewarmup = dr.LRRewarmup(2)
    ranks = RankScheduler(
        outer, optimizer, dynamic_rank(2, inflate=2, deflate=4), 6, layers="0",
        callbacks=[rewarmup], moments="calibrated",
    )  # fmt: skip
    assert ranks.model is core
    changed: list[int] = []
    for number in range(18):
        with accelerator.accumulate(model):
            accelerator.backward(outer(batch(number)).square().mean())
            optimizer.step()
            if ranks.step():
                changed.append(number)
            optimizer.zero_grad()
    assert (ranks.last_step, changed) == (6, [5, 11])
    dr.check(outer, optimizer, ranks=ranks)


class LightningOptimizer:
    """As Lightning's: it looks like the optimizer inside, and a strategy takes the steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__: Any = type("Lightning" + kind.__name__, (self.__class__, kind), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Strategy:
    def optimizer_step(self, optimizer: Any, closure: Any) -> Any:
        return optimizer.step(closure)


def lightnings(optimizer: Any) -> Any:
    """The stand-in, or Lightning's own where it is installed."""
    try:
        from lightning.pytorch.core.optimizer import LightningOptimizer as Real  # pyright: ignore
    except ImportError:
        return LightningOptimizer(optimizer)
    made = Real(optimizer)
    made._strategy = Strategy()
    return made


@pytest.mark.parametrize("kind", [LightningOptimizer, lightnings], ids=["stand-in", "lightning"])
def test_lightnings_two_optimizers_in_manual_optimization(kind: Any) -> None:
    model = net()
    rewarmup = dr.LRRewarmup(2)
    both = [kind(SGD(model[i].parameters(), 0.1, momentum=0.9)) for i in (0, 2)]
    schedule = dynamic_rank(2, inflate=2, deflate=4)
    ranks = RankScheduler(model, both, schedule, 6, layers="0", callbacks=[rewarmup])
    for number in range(12):
        loss = model(batch(number)).square().mean()
        if number % 2 == 0:
            both[0].step(lambda loss=loss: loss.backward())
            both[1].step(lambda: None)
            for one in both:
                one.zero_grad()
        ranks.step()
    assert ranks.last_step == 6
    dr.check(model, both, ranks=ranks)
