"""Calibration reads what weights give; calibrated truncation is the best there is on that data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from laws import DTYPES, LAYERS, LayerCase, assert_close, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.decompositions.truncation import ActivationStats, output_energies, project
from dynarank.monitors.calibration import Calibration
from dynarank.schedules import Clock, Readings
from dynarank.surgery.sites import survey

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's


def uneven(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Inputs that are far from white: channels of very different size, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * x.roll(1, -1).exp() + 0.5 * x.roll(1, 1 if x.ndim > 2 else -1)).to(dtype)


def built(case: LayerCase, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(case.make()).to(dtype)
    randomize(model)
    return model, uneven(case.shape, dtype)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The mean squared difference of the outputs, summed over channels."""
    with torch.no_grad():
        y, z = model(x), other(x)
    return (y - z).square().sum().item()


def truncated(model: nn.Module, rank: int, calibration: Calibration | None) -> nn.Module:
    return dr.factorize(copy.deepcopy(model), rank, layers="0", calibration=calibration)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_output_error_is_the_energy_cut_off_and_below_the_plain_one(case: LayerCase) -> None:
    """Law: the outputs' squared error is the sum of the discarded eigenvalues of E[y y']."""
    model, x = built(case)
    calibration = dr.calibrate(model, [x])
    (site,) = survey(model)
    activity = calibration.get("0")
    assert activity is not None
    energies = output_energies(site.effective().detach(), activity)
    for rank in {1, 2, energies.shape[1]}:
        rank = min(rank, energies.shape[1])
        aware = error(model, truncated(model, rank, calibration), x)
        plain = error(model, truncated(model, rank, None), x)
        cut = energies[:, rank:].sum().item() * activity.count
        whole = energies.sum().item() * activity.count
        assert aware == pytest.approx(cut, abs=1e-10 * whole)
        assert aware <= plain + 1e-10 * whole
    assert aware <= 1e-10 * whole or rank < energies.shape[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 999), st.data())
def test_no_other_map_of_that_rank_does_better(
    n: int, m: int, samples: int, seed: int, data: st.DataObject
) -> None:
    """Against random maps, the SVD, and projections on other outputs."""
    rank = data.draw(st.integers(1, min(n, m)))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, x = draw(n, m), draw(samples, m) * draw(m).exp()
    y = x @ weight.T
    side = data.draw(st.sampled_from(["input", "output"]))
    seen = x if side == "input" else y
    best, _ = project(weight, rank, ActivationStats(side, (seen.T @ seen / samples)[None], samples))
    least = (y - x @ best.T).square().sum()
    assert torch.linalg.svdvals(best)[rank:].sum() <= 1e-9 * weight.norm()
    s = torch.linalg.svdvals(y)
    whole = y.square().sum().item()
    assert least.item() == pytest.approx(s[rank:].square().sum().item(), abs=1e-9 * whole)
    u, v, w = torch.linalg.svd(weight, full_matrices=False)
    directions = draw(n, rank)
    others = [
        draw(n, rank) @ draw(rank, m),
        (u[:, :rank] * v[:rank]) @ w[:rank],
        directions @ torch.linalg.pinv(directions) @ weight,
    ]
    for other in others:
        assert (y - x @ other.T).square().sum() >= least - 1e-9 * whole


def test_it_equals_input_whitening_by_a_cholesky_factor() -> None:
    """(W L)_r L^-1 with C = L L', as published, where C allows it."""
    torch.manual_seed(0)
    weight, x = torch.randn(7, 5, dtype=torch.float64), uneven((50, 5), torch.float64)
    c = x.T @ x / 50
    root = torch.linalg.cholesky(c)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    published = (u[:, :2] * s[:2]) @ v[:2] @ torch.linalg.inv(root)
    assert_close(project(weight, 2, ActivationStats("input", c[None], 50))[0], published, 1e-10)


def test_directions_no_input_has_are_filled_from_the_weight() -> None:
    """With one input seen, rank 3 keeps its image and the best rank 2 of what is left."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    activity = ActivationStats("input", (x.T @ x)[None], 1)
    y = weight @ x[0]
    rest = weight - torch.outer(y, y) @ weight / y.square().sum()
    s = torch.linalg.svdvals(rest)
    kept, _ = project(weight, 3, activity)
    assert_close(kept @ x[0], y, 1e-12)
    assert (weight - kept).norm().item() == pytest.approx(s[2:].norm().item())
    assert_close(project(weight, 6, activity)[0], weight, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_nothing_is_lost_at_full_rank(case: LayerCase, dtype: torch.dtype) -> None:
    model, x = built(case, dtype)
    (site,) = survey(model)
    limit = site.spec.decomposition(LowRank(1)).limit(site.shape)
    factored = truncated(model, limit, dr.calibrate(model, [x[:1] if x.ndim > 3 else x]))
    assert_close(factored(x), model(x), 1e-11 if dtype == torch.float64 else 1e-4)


def test_factors_are_balanced_as_plain_ones_are() -> None:
    model, x = built(LAYERS[0])
    layer = truncated(model, 4, dr.calibrate(model, [x]))[0]
    up, down = layer.up.detach(), layer.down.detach()
    assert_close(up.T @ up, down @ down.T, 1e-9)


def test_the_bias_takes_up_the_mean_and_stays_the_same_parameter() -> None:
    """b + (I - P) E[y]: the outputs' mean is kept, and a change that fails moves no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9)).double()
    x = torch.randn(40, 6, dtype=torch.float64) + 3
    bias, values = model[0].bias, model[0].bias.detach().clone()
    calibration = dr.calibrate(model, [x])
    with pytest.raises(ValueError, match="limit"):
        dr.factorize(model, {"0": 99}, calibration=calibration)
    before = model(x).mean(0)
    with pytest.raises(AssertionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynarank.surgery.transaction.check_committed", lambda *a: _fail())
        dr.factorize(model, 2, layers="0", calibration=calibration)
    assert torch.equal(model[0].bias, values)
    dr.factorize(model, 2, layers="0", calibration=calibration)
    assert model[0].bias is bias and not torch.equal(bias, values)
    assert_close(model(x).mean(0), before)


def _fail() -> None:
    raise AssertionError


class Mixed(nn.Module):
    """Dropout, BatchNorm, a layer used twice, one used never, attention, a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        x = F.dropout(self.twice(F.relu(self.twice(x))), 0.5, self.training)
        return self.head(input=x + torch.randn(()) * 0)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Mixed().train()
    model.head.eval()
    model(torch.arange(11)[None]).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    calibration = dr.calibrate(model, [torch.arange(11)[None], torch.arange(5)[None]])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(dict(model.named_parameters())[n].grad, g) for n, g in grads.items())
    assert not any(m._forward_hooks for m in model.modules())
    assert calibration.missed == {"never": "no batch reached it"}
    assert calibration.get("twice").count == 2 * 16
    assert calibration.get("table").side == "row"


def test_every_use_counts_and_batches_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 12)).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    parts = dr.calibrate(model, list(x.split(2)), layers="2").get("2")
    hidden = F.relu(model[0](x)).detach()
    assert (parts.side, parts.count) == ("input", 9)
    assert_close(parts.mean[0], hidden.mean(0))
    assert_close(parts.second[0], hidden.T @ hidden / 9 - torch.outer(*2 * [hidden.mean(0)]))


def test_an_embedding_keeps_what_its_frequent_rows_need() -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(12, 6)).double(), torch.tensor([0, 0, 0, 0, 1, 1, 7])
    calibration = dr.calibrate(model, [ids])
    aware = dr.factorize(copy.deepcopy(model), 3, layers="0", calibration=calibration)
    assert error(model, aware, ids) < 1e-20


def test_weights_inside_a_module_are_listed() -> None:
    head = nn.Linear(6, 12, bias=False)
    model = nn.Sequential(nn.Embedding(12, 6), head)
    head.weight = model[0].weight
    model.append(nn.Linear(12, 3))
    calibration = dr.calibrate(model, [torch.arange(5)])
    assert (
        list(calibration.missed) == ["0"] and "looked up in one module" in calibration.missed["0"]
    )


def test_other_decompositions_split_the_weight_itself() -> None:
    from dynarank.decompositions.svd import SVD
    from dynarank.decompositions.truncation import split_activation_aware

    class Other(SVD):
        truncates_optimally = False

    weight = torch.randn(5, 6)
    activity = ActivationStats("input", torch.diag(torch.arange(6.0))[None], 1)
    plain = SVD().split(weight, 2)
    other, _ = split_activation_aware(Other(), weight, 2, activity)
    assert all(torch.equal(a, b) for a, b in zip(other, plain, strict=True))
    assert not torch.equal(split_activation_aware(SVD(), weight, 2, activity)[0][0], plain[0])


def test_it_lowers_the_loss_right_after_the_deflation_of_a_trained_network() -> None:
    """Three epochs of the digits: the order, not the figure."""
    from dynarank.train.data import load_digits_data

    data = load_digits_data()
    x, y = data.train_images.flatten(1), data.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 10))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in torch.randperm(3 * len(x)).remainder(len(x)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    inner = {"0": 16, "2": 16}
    calibration = dr.calibrate(model, x[:512].split(128))
    losses = [
        F.cross_entropy(
            dr.deflate(copy.deepcopy(model), inner, to="low-rank", calibration=known)(
                data.test_images.flatten(1)
            ),
            data.test_labels,
        ).item()
        for known in (None, calibration)
    ]
    with torch.no_grad():
        full = F.cross_entropy(model(data.test_images.flatten(1)), data.test_labels).item()
    assert losses[1] - full < 0.95 * (losses[0] - full)


def test_the_scheduler_calibrates_only_before_weights_become_low_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, asked = uneven((64, 16), torch.float32), []

    def batches() -> list[torch.Tensor]:
        asked.append(ranks.last_step)
        return [x]

    def schedule(clock: Clock, readings: Readings) -> dict[str, dr.LowRank | FullRank]:
        return {"0": FullRank() if clock.step < 2 else LowRank(4)}

    twin = copy.deepcopy(model)
    ranks = dr.RankScheduler(
        model, optimizer, schedule, 4, callbacks=[dr.ActivationAwareTruncation(batches)]
    )
    for _ in range(4):
        optimizer.step()
        ranks.step()
    assert asked == [2]
    dr.deflate(twin, 4, layers="0", to="low-rank", calibration=dr.calibrate(twin, [x]))
    assert_close(model(x), twin(x))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: dr.calibrate(m, []), "no batch"),
        (lambda m: dr.calibrate(m, ["text"]), "a batch is a tensor, .* got str"),
        (lambda m: dr.calibrate(m, [[]]), r"Sequential.forward.* does not take the batch \[\]"),
        (lambda m: dr.calibrate(m, [torch.full((2, 4), torch.nan)]), "layer '0'.*not finite"),
        (lambda m: dr.calibrate(m, [torch.ones(2, 4)], forward=lambda m, b: 0), "used no weight"),
        (
            lambda m: dr.factorize(
                m, 1, layers="0",
                calibration=dr.calibrate(nn.Sequential(nn.Linear(4, 3)), [torch.ones(2, 4)]),
            ),
            "calibrate this model",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(run: object, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    with pytest.raises(ValueError, match=message):
        run(model)  # type: ignore[operator]
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(8, 8), lambda: nn.MultiheadAttention(8, 2)], ids=["lstm", "attention"]
)
def test_a_model_whose_weights_are_all_beyond_reach_is_not_refused(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), torch.randn(3, 2, 8)
    batch = (x,) if isinstance(model, nn.LSTM) else (x, x, x)
    known = dr.calibrate(model, [batch])
    assert not known and known.missed
