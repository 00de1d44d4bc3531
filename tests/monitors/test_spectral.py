from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import DTYPES, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, Rank, SpectralMonitor
from dynarank.forms import Form, RankLike
from dynarank.monitors.singular_values import (
    effective_rank,
    energy_rank,
    singular_values,
    spectral_ratio,
    stable_rank,
)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers "0" (weight 12 x 27), "3" (10 x 12) and "4" (4 x 10)."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 10), nn.Linear(10, 4)).to(dtype)


FORMS = [
    FullRank(),
    LowRank(3),
    Adapted(3),
    Adapted(2, alpha=3.0, execution="two-branch"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_readings_are_the_measures_of_the_effective_weight(form: Form, dtype: torch.dtype) -> None:
    model = net(dtype)
    dr.apply_plan(model, {"0": form, "3": form})
    randomize(model)
    readings = SpectralMonitor(model, rank=2, layers=["0", "3"]).read()
    assert list(readings) == ["0", "3"]
    for path, reading in readings.items():
        values = torch.linalg.svdvals(by_hand(model.get_submodule(path), form))
        close = 1e-10 if dtype == torch.float64 else 1e-4  # noise in the directions without weight
        assert reading.effective_rank == pytest.approx(effective_rank(values), rel=close)
        assert reading.stable_rank == pytest.approx(stable_rank(values), rel=1e-5)
        assert reading.spectral_ratio == pytest.approx(spectral_ratio(values, 2), rel=1e-5)
        assert reading.energy_rank == energy_rank(values)
        assert reading.rank == 2
        assert reading.full_rank == {"0": 12, "3": 10}[path]


def by_hand(layer: nn.Module, form: Form) -> Tensor:
    """base + alpha / rank * up @ down, matricized, in fp64."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    if isinstance(form, FullRank):
        return p["weight"].flatten(1)
    joined = p["up"].flatten(1) @ p["down"].flatten(1)
    if isinstance(form, LowRank):
        return joined
    return p["base"].flatten(1) + form.alpha / form.rank * joined  # type: ignore[operator]


def in_bf16(read: Callable[[], object]) -> object:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return read()


def test_lambda_of_a_low_rank_layer_in_bf16_is_one_at_its_rank() -> None:
    torch.manual_seed(0)
    model = dr.factorize(nn.Sequential(nn.Linear(64, 64)).bfloat16(), 4)
    assert SpectralMonitor(model).read()["0"].spectral_ratio == pytest.approx(1.0, abs=1e-6)


def test_readings_do_not_depend_on_autocast() -> None:
    model = dr.factorize(net(torch.float32), 3)
    monitor = SpectralMonitor(model)
    assert in_bf16(monitor.read) == monitor.read()


def train(model: nn.Module, monitored: bool) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    monitor = SpectralMonitor(model)
    for step in range(6):
        if step == 3:
            dr.deflate(model, 2, layers=["0", "3"], optimizer=optimizer)
        x = nn.functional.dropout(torch.randn(4, 3, 5, 5))  # draws from the global generator
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if monitored:
            assert len(monitor.read()) == 2
        optimizer.step()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_monitoring_changes_nothing_bit_by_bit(form: Form) -> None:
    runs = []
    for monitored in (False, True):
        model = net(torch.float32)
        dr.apply_plan(model, {"0": LowRank(2), "3": LowRank(2)})
        dr.apply_plan(model, {"0": form, "3": form})
        runs.append(train(model, monitored))
    (plain, plain_rng), (watched, watched_rng) = runs
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(plain_rng, watched_rng)


def test_reading_leaves_gradients_and_parameters_alone() -> None:
    model = dr.factorize(net(), 3)
    model(torch.ones(2, 3, 5, 5, dtype=torch.float64)).sum().backward()
    before = {n: (p, p.grad, p.grad.clone(), p._version) for n, p in model.named_parameters()}
    SpectralMonitor(model).read()
    for name, p in model.named_parameters():
        same, grad, value, version = before[name]
        assert p is same and p.grad is grad and torch.equal(grad, value) and p._version == version


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_is_left_out(form: Form, bad: float) -> None:
    model = net()
    dr.apply_plan(model, {"0": form, "3": form, "4": LowRank(2)})
    monitor = SpectralMonitor(model, layers="*")
    assert list(monitor.read()) == ["0", "3", "4"]
    with torch.no_grad():
        next(model[3].parameters()).flatten()[0] = bad
    assert list(monitor.read()) == ["0", "4"]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(3, [3, 3]), (Rank(0.25, of="out"), [3, 2]), (Rank(0.5, of="min"), [6, 5])],
    ids=str,
)
def test_lambda_is_taken_at_the_rank_asked_for(rank: RankLike, expected: list[int]) -> None:
    model = net()
    dr.apply_plan(model, {"0": LowRank(2), "3": LowRank(4)})
    readings = SpectralMonitor(model, rank=rank).read()
    assert [reading.rank for reading in readings.values()] == expected
    for path, reading in readings.items():
        values = singular_values(model.get_submodule(path).weight)
        assert reading.spectral_ratio == pytest.approx(spectral_ratio(values, reading.rank))


def test_lambda_is_taken_at_the_rank_each_layer_has_or_last_had() -> None:
    model = net()
    monitor = SpectralMonitor(model, layers=["0", "3", "4"])
    assert [r.rank for r in monitor.read().values()] == [6, 5, 2]  # never had factors: half
    dr.apply_plan(model, {"0": LowRank(4), "3": Adapted(7)})
    assert [r.rank for r in monitor.read().values()] == [4, 7, 2]
    dr.apply_plan(model, {"0": FullRank(), "3": FullRank()})
    assert [r.rank for r in monitor.read().values()] == [4, 7, 2]
    dr.merge(model)
    assert [r.rank for r in monitor.read().values()] == [6, 5, 2]


def test_by_default_the_ranked_layers_are_watched_or_else_all() -> None:
    model = nn.Sequential(net(), nn.Embedding(5, 5).double())
    monitor = SpectralMonitor(model)
    assert list(monitor.read()) == ["0.0", "0.3", "0.4"]
    dr.apply_plan(model, {"0.3": LowRank(2)})
    assert list(monitor.read()) == ["0.3"]
    dr.inflate(model)
    assert list(monitor.read()) == ["0.3"]
    dr.merge(model)
    assert list(monitor.read()) == ["0.0", "0.3", "0.4"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0", ["0"]),
        ("[34]", ["3", "4"]),
        (["4", "0"], ["0", "4"]),
        (lambda module, path: isinstance(module, nn.Linear), ["3", "4"]),
    ],
    ids=["name", "glob", "list", "function"],
)
def test_layers_can_be_named(layers: object, expected: list[str]) -> None:
    model = dr.factorize(net(), 2, layers="0")
    assert list(SpectralMonitor(model, layers=layers).read()) == expected  # type: ignore[arg-type]


def test_layers_that_match_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="'fc\\*' matches no layer"):
        SpectralMonitor(net(), layers="fc*").read()


def test_a_rank_above_a_layers_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rank 5 is above the limit 4 .* \(4, 10\)"):
        SpectralMonitor(net(), rank=5).read()


def test_a_reading_of_known_singular_values() -> None:
    layer = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, 2.0, 2.0, 0.0]))[:, :3])
    (reading,) = SpectralMonitor(nn.Sequential(layer), rank=1).read().values()
    assert reading.effective_rank == pytest.approx(2 * math.sqrt(2), rel=1e-12)
    assert reading.stable_rank == pytest.approx(1.5, rel=1e-12)
    assert reading.spectral_ratio == pytest.approx(0.5, rel=1e-12)
    assert (reading.rank, reading.full_rank) == (1, 3)


# Reading now and then.


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timed(SpectralMonitor):
    """A monitor whose readings take ``cost`` seconds on a clock of its own."""

    def __init__(self, cost: float, share: float = 0.01) -> None:
        self.clock, self.cost, self.taken = Clock(), cost, 0
        super().__init__(nn.Sequential(nn.Linear(4, 4)), share=share, clock=self.clock)

    def read(self):  # type: ignore[no-untyped-def]
        self.clock.now += self.cost
        self.taken += 1
        return super().read()


def test_a_monitor_reads_every_few_steps() -> None:
    monitor = SpectralMonitor(net(), every=3)
    read = [monitor.step() for _ in range(7)]
    assert [reading is not None for reading in read] == [False, False, True] * 2 + [False]
    assert read[2] == monitor.read()


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize("cost", [0.001, 0.3, 7.0])
def test_readings_never_take_more_than_their_share_once_their_cost_is_known(
    cost: float, share: float
) -> None:
    monitor = Timed(cost, share)
    began, steps = monitor.clock.now, 4000
    assert monitor.step() is None  # nothing to take a share of yet
    for _ in range(steps):
        monitor.clock.now += 0.05
        before = monitor.taken
        monitor.step()
        spent, elapsed = monitor.taken * cost, monitor.clock.now - began
        assert before == 0 or monitor.taken == before or spent <= share * elapsed + 1e-9
    affordable = share * (monitor.clock.now - began) / cost
    assert min(steps, affordable) - 2 <= monitor.taken <= max(affordable, 1)


def test_the_first_reading_waits_until_its_guessed_cost_is_affordable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = Timed(0.5)
    monkeypatch.setattr(monitor, "_guess", lambda: 0.4)
    monitor.step()
    monitor.clock.now += 79.0  # twice the cost is allowed for
    assert monitor.step() is None
    monitor.clock.now += 2.0
    assert monitor.step() is not None


def test_the_guess_grows_with_the_model() -> None:
    clock = Clock()

    def tick() -> float:
        clock.now += 1.0
        return clock.now

    def guess(width: int) -> float:
        model = nn.Sequential(nn.Linear(width, width))
        return SpectralMonitor(model, clock=tick)._guess()

    assert guess(512) == pytest.approx(8 * guess(256))
    assert guess(256) == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"every": 0}, {"share": 0.0}, {"share": 1.5}], ids=str)
def test_impossible_intervals_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        SpectralMonitor(net(), **settings)  # type: ignore[arg-type]


def test_a_low_rank_layer_is_read_without_being_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(net(), 3)
    expected = SpectralMonitor(model).read()

    def refuse(*_: object) -> Tensor:
        raise AssertionError("joined")

    monkeypatch.setattr("dynarank.layers.WeightSpec.effective", refuse)
    assert SpectralMonitor(model).read() == expected


# All that a monitor can read, in a net with everything that has a state of its own.


def noisy_net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2)]
    last = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 32), nn.Linear(32, 5)]
    return dr.factorize(nn.Sequential(*first, *last), 4, layers=["0", "6"])


def train_noisy(monitor: SpectralMonitor | None, model: nn.Module, steps: int) -> float:
    """Train through two changes of form; the monitor's share of the processor's time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(3)
    began, inside = time.process_time(), 0.0
    for step in range(steps):
        if step == steps // 3:
            dr.inflate(model, layers="6", optimizer=optimizer)
        if step == steps // 2:
            dr.deflate(model, layers="6", optimizer=optimizer)
        optimizer.zero_grad()
        model(torch.randn(16, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        before = time.process_time()
        if monitor is not None:
            monitor.step()
        inside += time.process_time() - before
    return inside / (time.process_time() - began)


@pytest.mark.parametrize("every", [1, 4, None])
def test_no_reading_of_any_kind_changes_the_run(every: int | None) -> None:
    runs = []
    for watched in (False, True):
        model = noisy_net()
        share = 1.0 if every is None else 0.01  # by the clock, but often
        settings = {"every": every, "share": share, "updates": True, "values": 64}
        train_noisy(SpectralMonitor(model, **settings) if watched else None, model, 12)  # type: ignore[arg-type]
        runs.append((model.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (seen, seen_rng) = runs
    assert plain.keys() == seen.keys()
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(plain_rng, seen_rng)


def test_equal_weights_give_equal_readings() -> None:
    """A schedule may decide by them: a run that is repeated decides the same."""
    readings = []
    for _ in range(2):
        model = noisy_net()
        monitor = SpectralMonitor(model, updates=True, values=5)
        train_noisy(None, model, 9)
        torch.manual_seed(len(readings))
        readings.append(monitor.read())
    assert readings[0] == readings[1] == monitor.read()
    assert all(reading.finite for reading in readings[0].values())


def test_the_default_interval_takes_about_one_per_cent() -> None:
    """Generous: the budget is by the clock, this is by the processor's time of a short run."""
    model = noisy_net(64)
    monitor = SpectralMonitor(model, updates=True, values=64)
    assert train_noisy(monitor, model, 200) < 0.03


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (2, 2), (5, 5), (12, 12), (64, 12)])
def test_singular_values_are_kept_evenly_from_first_to_last(count: int, kept: int) -> None:
    model = net()
    values = singular_values(model[0].weight).tolist()
    found = SpectralMonitor(model, layers="0", values=count).read()["0"].values
    assert len(found) == kept
    places = [values.index(value) for value in found]
    assert places[:1] == [0][:kept] and (kept < 2 or places[-1] == 11)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_fewer_than_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="values=-1"):
        SpectralMonitor(net(), values=-1)


# Its state.


@pytest.mark.parametrize("before", [FullRank(), LowRank(3)])
def test_a_monitor_goes_on_from_its_state_with_the_updates_since_its_creation(before: Form) -> None:
    def made() -> tuple[nn.Sequential, SpectralMonitor]:
        model = net()
        dr.apply_plan(model, {"3": before})
        return model, SpectralMonitor(model, layers=["0", "3"], every=3, updates=True)

    (model, monitor), (again, _) = made(), made()
    randomize(model, 1)
    monitor.step()
    randomize(again, 2)
    every: dict[str, Any] = {"layers": ["0", "3"], "every": 3, "updates": True}
    late, unloaded = SpectralMonitor(again, **every), SpectralMonitor(again, **every)
    late.load_state_dict(copy.deepcopy(monitor.state_dict()))
    dr.apply_plan(again, dr.current_plan(model))
    again.load_state_dict(model.state_dict())
    assert [late.step() for _ in range(2)] == [monitor.step() for _ in range(2)]
    assert unloaded.read() != late.read()


def test_the_monitor_of_another_model_is_refused() -> None:
    monitor = SpectralMonitor(nn.Sequential(nn.Linear(4, 4)), updates=True)
    other = SpectralMonitor(nn.Sequential(nn.Linear(5, 4)), updates=True)
    with pytest.raises(ValueError, match="the state of another model"):
        monitor.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the state of a cadence"):
        monitor.load_state_dict({**monitor.state_dict(), "cadence": {"steps": -1}})
