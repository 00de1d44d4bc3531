"""The gradient noise scale: right where it can be known, and without a trace in the run."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dynarank as dr
from dynarank import LowRank
from dynarank.contrib.noise_scale import (
    Average,
    Estimate,
    NoiseMonitor,
    from_norms,
    from_shards,
    noise_scale,
    squared_norm,
)


def samples(count: int, size: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, size, dtype=torch.float64, generator=generator) + 0.5


def executions(count: int, shards: int) -> Iterator[list[list[int]]]:
    """All ways to deal ``count`` samples into equal shards, in order."""
    each = count // shards
    for order in itertools.permutations(range(count)):
        parts = [list(order[i : i + each]) for i in range(0, count, each)]
        if all(part == sorted(part) for part in parts):
            yield parts


@pytest.mark.parametrize(("count", "shards"), [(4, 2), (6, 2), (6, 3), (6, 6)])
def test_over_all_ways_to_shard_a_batch_the_mean_is_the_samples_own(
    count: int, shards: int
) -> None:
    """Unbiased: S averages to the trace of the sample covariance, Q to the U-statistic of |G|^2."""
    x = samples(count)
    found = [
        from_shards(([x[part].mean(0)] for part in parts), count // shards)[0]
        for parts in executions(count, shards)
    ]
    trace = float(x.var(0, correction=1).sum())
    pairs = float((x.sum(0).square() - x.square().sum(0)).sum()) / (count * (count - 1))
    assert math.fsum(e.noise for e in found) / len(found) == pytest.approx(trace, rel=1e-12)
    assert math.fsum(e.signal for e in found) / len(found) == pytest.approx(pairs, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(1, 50), st.integers(0, 99))
def test_shards_and_norms_agree(shards: int, each: int, seed: int) -> None:
    torch.manual_seed(seed)
    gradients = [torch.randn(4, 3, dtype=torch.float64) for _ in range(shards)]
    (found,) = from_shards(([g] for g in gradients), each)
    small = sum(squared_norm(g) for g in gradients) / shards
    large = squared_norm(torch.stack(gradients).mean(0))
    expected = from_norms(small, large, (each, each * shards))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_two_halves_give_half_their_distance_and_their_inner_product() -> None:
    a, b = samples(2)
    (found,) = from_shards([[a], [b]], 5)
    assert found.noise == pytest.approx(5 * float((a - b).square().sum()) / 2)
    assert found.signal == pytest.approx(float(a @ b))


def test_little_noise_in_single_precision_is_not_lost_in_a_difference() -> None:
    a = torch.full((1000,), 1.0)
    b = a + torch.tensor([1e-5, -1e-5]).repeat(500)
    (found,) = from_shards([[a], [b]], 1)
    assert found.noise == pytest.approx(0.5 * float((a - b).double().square().sum()), rel=1e-4)


def test_a_gradient_that_is_missing_is_zero() -> None:
    g = torch.tensor([2.0, 0.0])
    zero = torch.zeros(2)
    for missing, whole in [
        ([None, g], [zero, g]),
        ([g, None], [g, zero]),
        ([None, None], [zero] * 2),
    ]:
        assert from_shards([[m] for m in missing], 3) == from_shards([[w] for w in whole], 3)


def test_a_sparse_gradient_is_read() -> None:
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    shards = [[dense.to_sparse()], [2 * dense.to_sparse()]]
    assert from_shards(shards, 1) == from_shards([[dense], [2 * dense]], 1)


def test_gradients_are_left_as_they_are() -> None:
    g = torch.ones(3)
    from_shards([[g], [2 * g], [g]], 1)
    assert g.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shards", [[], [[torch.ones(2)]]], ids=len)
def test_fewer_than_two_shards_are_an_error(shards: list[list[torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match=f"two or more shards of a batch, got {len(shards)}"):
        from_shards(shards, 1)


def test_an_empty_shard_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        from_shards([[torch.ones(2)]] * 2, 0)


def test_an_average_is_without_bias_and_forgets() -> None:
    average = Average(0.5)
    average.add(Estimate(1.0, 8.0))
    average.add(Estimate(4.0, 2.0))
    assert average.value == pytest.approx(
        ((0.25 * 1 + 0.5 * 4) / 0.75, (0.25 * 8 + 0.5 * 2) / 0.75)
    )


def test_the_scale_of_parts_is_of_their_sums() -> None:
    assert noise_scale([Estimate(6.0, 2.0), Estimate(2.0, -1.0)]) == 8.0
    assert noise_scale([Estimate(6.0, -2.0)]) == math.inf
    assert noise_scale([Estimate(-6.0, 2.0)]) == 0.0
    assert math.isnan(noise_scale([Estimate(0.0, 0.0)]))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers "0" and "5"; a normalization and a dropout between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(24, 5),
    ).to(dtype)  # fmt: skip


def batch(size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2, 4, 4, dtype=dtype), torch.randint(5, (size,))


class Known(nn.Module):
    """Loss w . x: a sample's gradient is the sample."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, 1, bias=False).double()
        self.second = nn.Linear(size, 1, bias=False).double()

    def loss(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return (self.first(x[0]) + self.second(x[1])).mean()


def test_a_known_scale_is_found() -> None:
    """Gradients N(mean, deviation^2): tr(Sigma) / |G|^2 = deviation^2 / mean^2."""
    torch.manual_seed(0)
    model, size, half = Known(50), 50, 32
    noise = NoiseMonitor(model, decay=0.999)
    for _ in range(400):
        x = torch.randn(2, 2 * half, size, dtype=torch.float64)
        parts = [(3 * part[0] + 0.5, 2 * part[1] + 1.0) for part in x.split(half, 1)]
        reading = noise.measure(model.loss, parts, half)
    assert reading.layers["first"] == pytest.approx(9 / 0.25, rel=0.05)
    assert reading.layers["second"] == pytest.approx(4 / 1.0, rel=0.05)
    assert reading.noise_scale == pytest.approx((9 + 4) / (0.25 + 1.0), rel=0.05)


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda part: F.cross_entropy(model(part[0]), part[1])


def halves(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


def by_hand(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    found = []
    for part in parts:
        model.zero_grad()
        loss_of(model)(part).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


def test_it_is_computed_of_the_parts_gradients_by_layer() -> None:
    model = net(torch.float64)
    model[3].p = 0.0
    parts = halves(*batch(dtype=torch.float64))
    estimates = from_shards(by_hand(copy.deepcopy(model), parts), 8)
    reading = NoiseMonitor(model).measure(loss_of(model), parts, 8)
    names = [name for name, _ in model.named_parameters()]
    assert reading.noise_scale == pytest.approx(noise_scale(estimates), rel=1e-12)
    of = dict(zip(names, estimates, strict=True))
    assert reading.layers == pytest.approx(
        {"0": noise_scale([of["0.weight"]]), "5": noise_scale([of["5.weight"]])}, rel=1e-12
    )


def test_gradients_that_one_has_give_the_same() -> None:
    model = net(torch.float64)
    model[3].p = 0.0
    parts = halves(*batch(dtype=torch.float64))
    measured = NoiseMonitor(model).measure(loss_of(model), parts, 8)
    names = [name for name, _ in model.named_parameters()]
    shards = [dict(zip(names, g, strict=True)) for g in by_hand(copy.deepcopy(model), parts)]
    fed = NoiseMonitor(model).feed(iter(shards), 8)
    assert fed.noise_scale == pytest.approx(measured.noise_scale, rel=1e-12)
    assert fed.layers == pytest.approx(measured.layers, rel=1e-12)


def test_gradient_accumulation_gives_it_by_norms() -> None:
    """|g_b|^2 of the first micro-batch, |g_B|^2 of both: the paper's pair."""
    model = net(torch.float64)
    model[3].p = 0.0
    parts = halves(*batch(dtype=torch.float64))
    first, second = by_hand(copy.deepcopy(model), parts)
    noise = NoiseMonitor(model)
    for part in parts:
        (loss_of(model)(part) / 2).backward()
        if part is parts[0]:
            small = noise.norms(scale=2.0)
    reading = noise.feed_norms(small, noise.norms(), samples=(8, 16))
    one = sum(float(g.square().sum()) for g in first)
    both = sum(float(((a + b) / 2).square().sum()) for a, b in zip(first, second, strict=True))
    assert sum(small.values()) == pytest.approx(one, rel=1e-12)
    assert list(small) == ["0", "", "5"]
    expected = noise_scale([from_norms(one, both, (8, 16))])
    assert reading.noise_scale == pytest.approx(expected, rel=1e-9)


def train(monitor: str, form: LowRank | None) -> tuple[dict[str, Tensor], Tensor]:
    model = net()
    if form is not None:
        dr.apply_plan(model, {"0": form, "5": form})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(3)
    noise = NoiseMonitor(model, every=2)
    for step in range(6):
        if step == 3:
            dr.inflate(model, optimizer=optimizer) if form else None
        x, y = batch()
        optimizer.zero_grad()
        loss = loss_of(model)((x, y))
        if monitor == "between":  # while a graph waits for its backward pass
            noise.measure(loss_of(model), halves(x, y), 8)
        loss.backward()
        if monitor == "step":
            reading = noise.step(loss_of(model), lambda x=x, y=y: halves(x, y), 8)
            assert (reading is not None) == (step % 2 == 1)
        if monitor == "norms":
            noise.feed_norms(noise.norms(), noise.norms(), (8, 16))
        optimizer.step()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state()


@pytest.mark.parametrize("form", [None, LowRank(2)], ids=str)
@pytest.mark.parametrize("monitor", ["step", "between", "norms"])
def test_the_run_is_the_same_bit_by_bit(monitor: str, form: LowRank | None) -> None:
    (plain, plain_rng), (watched, watched_rng) = train("", form), train(monitor, form)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(plain_rng, watched_rng)


def test_gradients_that_are_there_stay() -> None:
    model = net()
    loss_of(model)(batch()).backward()
    before = {n: (p.grad, p.grad.clone(), p._version) for n, p in model.named_parameters()}
    with torch.no_grad():
        NoiseMonitor(model).measure(loss_of(model), halves(*batch()), 8)
    for name, p in model.named_parameters():
        grad, value, version = before[name]
        assert p.grad is grad and torch.equal(grad, value) and p._version == version


def test_a_frozen_or_unused_parameter_takes_no_part() -> None:
    model = net()
    model.extra = nn.Linear(3, 3)
    model[0].requires_grad_(False)
    noise = NoiseMonitor(model)
    reading = noise.measure(lambda p: F.cross_entropy(model[:6](p[0]), p[1]), halves(*batch()), 8)
    assert set(reading.layers) == {"5", "extra"}


def test_averages_restart_where_a_layer_changes_form() -> None:
    model = net()
    noise = NoiseMonitor(model)
    torch.manual_seed(1)
    for _ in range(3):
        reading = noise.measure(loss_of(model), halves(*batch()), 8)
    dr.apply_plan(model, {"5": LowRank(2)})
    parts = halves(*batch())
    alone = NoiseMonitor(model).measure(loss_of(model), parts, 8)
    after = noise.measure(loss_of(model), parts, 8)
    assert after.layers["5"] == alone.layers["5"] != reading.layers["5"]
    assert after.layers["0"] != alone.layers["0"]


def test_by_default_it_waits_until_one_more_step_is_well_within_one_per_cent() -> None:
    now = [0.0]
    model = net()
    noise = NoiseMonitor(model, clock=lambda: now[0])
    due = []
    for step in range(310):
        now[0] += 1.0

        def parts(step: int = step) -> list[tuple[Tensor, Tensor]]:
            due.append(step)
            now[0] += 1.0  # what a reading costs
            return halves(*batch())

        noise.step(loss_of(model), parts, 8)
    assert due == [200, 299]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: NoiseMonitor(m, decay=1.0), r"lies in \[0, 1\), got 1.0"),
        (lambda m: NoiseMonitor(m, every=0), "every=0"),
        (lambda m: NoiseMonitor(m).feed([], 4), "two or more shards of a batch, got 0"),
        (lambda m: NoiseMonitor(m).feed([{"x": torch.ones(1)}], 4), "no parameter 'x'"),
        (lambda m: NoiseMonitor(m).feed_norms({"0": 1.0}, {"0": 1.0}, (8, 8)), "must be larger"),
        (lambda m: NoiseMonitor(m).feed_norms({"0": 1.0}, {"5": 1.0}, (8, 16)), "'0' were given"),
    ],
    ids=["decay", "every", "shards", "name", "sizes", "layers"],
)
def test_what_cannot_be_is_an_error(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(net())
