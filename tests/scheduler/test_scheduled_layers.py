"""What a phase to come would lose is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_run import FULL, LAST, LOW, net, sgd, train_step, untouched
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import dynarank as dr
from dynarank import RankScheduler
from dynarank.forms import Change, Form
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.schedules import Phases, cuttlefish
from dynarank.surgery.sites import Site

LATE = Phases([0, 3], [FULL, LOW])
LATER = Phases([0, 3, 5], [FULL, LOW, LAST])
LAYERS = ["0", "2"]


def same(grad: Tensor) -> Tensor:
    return grad


HOOKS: list[Callable[[nn.Parameter], Any]] = [
    lambda p: p.register_hook(same),
    lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
]


@pytest.mark.parametrize("register", HOOKS)
def test_gradient_hooks_are_refused_at_construction(
    register: Callable[[nn.Parameter], Any],
) -> None:
    model = net()
    optimizer = sgd(model)
    register(model[2].weight)
    words = r"from step 3, layer '2': its weight has gradient hooks.* by a callback, in its before_"
    with untouched(model, optimizer), pytest.raises(ValueError, match=words):
        RankScheduler(model, optimizer, LATE, 6, layers=LAYERS, callbacks=[dr.LRRewarmup(2)])
    RankScheduler(model, optimizer, LATE, 6, layers="0").close()
    RankScheduler(model, optimizer, lambda clock, readings: {}, 6, layers=LAYERS).close()


def test_hooks_registered_after_the_last_change_are_no_matter_to_a_run_that_goes_on() -> None:
    model = net()
    optimizer = sgd(model)
    ranks = RankScheduler(model, optimizer, LATE, 6, layers=LAYERS)
    for step in range(4):
        train_step(model, optimizer, step)
        ranks.step()
    model[0].up.register_hook(same)
    saved = ranks.state_dict()
    ranks.close()
    RankScheduler(model, optimizer, LATE, 6, state=saved).close()
    with pytest.raises(ValueError, match=r"from step 5, layer '0': its (up|down) has gradient hoo"):
        RankScheduler(model, optimizer, LATER, 6, layers=LAYERS, state={**saved, "last_step": 4})


class Moves(Callback):
    """Takes a gradient hook off before a change, and puts it on the new parameters after."""

    def __init__(self, model: nn.Sequential) -> None:
        self.calls, self.layer = 0, model[0]
        self.put()

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.layer.parameters() if p.ndim > 1 and p.requires_grad]

    def put(self) -> None:
        self.handles = [p.register_hook(self.seen) for p in self.weights()]

    def seen(self, grad: Tensor) -> None:
        self.calls += 1

    def before_change(self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]) -> None:
        for handle in self.handles:
            handle.remove()

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        self.put()


def test_a_callback_takes_hooks_through_every_change() -> None:
    model = net()
    optimizer, moves = sgd(model), Moves(model)
    ranks = RankScheduler(model, optimizer, LATER, 6, layers=LAYERS, callbacks=[moves])
    calls: list[int] = []
    for step in range(6):
        train_step(model, optimizer, step)
        ranks.step()
        calls.append(moves.calls)
    assert calls == [1, 2, 3, 5, 7, 9] and dr.current_plan(model)["0"] == LAST


class Keeps(SGD):
    """Keeps something of a layer for itself."""

    def __init__(self, model: nn.Module, kept: Any) -> None:
        super().__init__(model.parameters(), 0.1)
        self.kept = kept


@pytest.mark.parametrize("schedule", [LATE, cuttlefish()])
def test_an_optimizer_that_could_not_follow_is_refused_at_construction(schedule: Any) -> None:
    model = net()
    optimizer = Keeps(model, {"2": model[2].weight})
    words = r"Keeps holds parameters .* in its attribute 'kept'.* a RankScheduler"
    with untouched(model, optimizer), pytest.raises(ValueError, match=words):
        RankScheduler(model, optimizer, schedule, 100, layers=LAYERS)
    RankScheduler(model, optimizer, LATE, 6, layers="0").close()
    RankScheduler(model, optimizer, lambda clock, readings: {}, 6, layers=LAYERS).close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimizer_that_deals_parameters_to_processes_is_refused_by_name() -> None:
    """Also in one process, where it would train."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        optimizer: Optimizer = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)
        words = r"from step 3, ZeroRedundancyOptimizer .*fully_shard \(FSDP2\).* a plain optimizer"
        with pytest.raises(ValueError, match=words):
            RankScheduler(model, optimizer, LATE, 6, layers=LAYERS)
        with pytest.raises(ValueError, match=r"^ZeroRedundancyOptimizer .*a plain optimizer"):
            dr.factorize(model, 2, optimizer=optimizer)
        assert type(model[0]) is nn.Linear and torch.is_tensor(model[0].weight)
    finally:
        dist.destroy_process_group()
