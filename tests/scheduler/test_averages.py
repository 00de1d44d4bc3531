"""Averages of the weights: followed through every change of form, or refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, RankScheduler
from dynarank.decompositions import Decomposition, Geometry, get_decomposition
from dynarank.decompositions.truncation import ActivationStats
from dynarank.forms import Form
from dynarank.scheduler.averages import Averages
from dynarank.scheduler.batch_norm import BatchNormRecalibration
from dynarank.surgery import average_edits as average_edits_module
from dynarank.surgery.edit import Edit
from dynarank.surgery.transaction import change_forms, differences
from tests.every_layer import KINDS, Kind
from tests.host_runs import (
    DEFLATE,
    ENDINGS,
    INFLATE,
    STEPS,
    adamw,
    batches,
    loss_of,
    mlp,
    ranks_of,
    schedule,
)

F64 = torch.float64
DECAY = 0.9


def change(
    model: nn.Module,
    form: Form | Mapping[str, Form],
    *averages: nn.Module,
    calibration: Mapping[str, ActivationStats] | None = None,
) -> None:
    """Bring a model to a form, and its averages with it."""
    sites = [site for site in dr.survey(model) if site.form is not None]
    plan = form if isinstance(form, Mapping) else {site.path: form for site in sites}
    wanted = differences(model, plan)
    change_forms(wanted, calibration=calibration, averages=lambda: averages)


@torch.no_grad()
def moved(module: nn.Module, by: float = 0.1, seed: int = 0) -> nn.Module:
    """The module, its parameters a little elsewhere."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=by)
    return module


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The effective weights, in fp64."""
    return {one.path: one.exact().detach().clone() for one in dr.survey(model) if one.form}


def ema_of(model: nn.Module, **how: Any) -> AveragedModel:
    return AveragedModel(model, **(how or {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}))


def copies_of(tensors: Any) -> list[Tensor]:
    return [one.detach().clone() for one in tensors]


def same(one: nn.Module, other: nn.Module) -> None:
    """Both modules have the same forms, names and values."""
    assert dr.survey(one)[0].form == dr.survey(other)[0].form
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert [*ours] == [*theirs]
    for name, p in ours.items():
        torch.testing.assert_close(theirs[name], p, atol=1e-5, rtol=1e-4, msg=name)


# The equations, for every layer and decomposition.

DECOMPOSITIONS = ["svd", "tucker", "cp", "separable"]


def conv(groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 10, 3, groups=groups))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_average_equal_to_the_model_stays_equal(kind: Kind) -> None:
    model = moved(kind.make()).double()
    average = copy.deepcopy(model)
    for form in (LowRank(2), FullRank(), Adapted(2), LowRank(1), LowRank(2), FullRank()):
        change(model, form, average)
        same(model, average)
        moved(model, seed=1)
        moved(average, seed=1)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_truncated_average_is_the_nearest_in_the_models_basis(
    decomposition: str, groups: int
) -> None:
    torch.manual_seed(0)
    model = conv(groups).double()
    average = moved(copy.deepcopy(model))
    before, mine = weights(average)["0"], weights(model)["0"]
    change(model, form := LowRank(2, decomposition), average)
    ours, theirs = (dict(one[0].named_parameters()) for one in (model, average))
    for name in ours.keys() - {"up", "bias"}:
        assert torch.equal(ours[name], theirs[name])
    # What is lost is orthogonal to all that up can change.
    lost = (before - weights(average)["0"]) - (mine - weights(model)["0"])
    spec = dr.survey(average)[0].spec
    factors = tuple(p.detach() for p in spec.factors(form, theirs))
    *_, gradient = spec.decomposition(form).pull(factors, lost)
    assert gradient.abs().max() < 1e-10
    assert lost.norm() < (before - mine).norm()


class Backwards(Decomposition):
    """A user's decomposition whose last factor is not that of the outputs."""

    name = "backwards"

    def limit(self, shape: Sequence[int]) -> int:
        return min(shape)

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        return (shape[0], rank), (rank, shape[1])

    def split(self, weight: Tensor, rank: int) -> tuple[Tensor, ...]:
        down, up = get_decomposition("svd", 1).split(weight, rank)
        return up, down

    def join(self, factors: tuple[Tensor, ...]) -> Tensor:
        return factors[0] @ factors[1]

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        return geometry, geometry


def test_a_last_factor_of_any_kind_is_fitted() -> None:
    torch.manual_seed(0)
    factors = torch.randn(6, 2, dtype=F64), torch.randn(2, 5, dtype=F64)
    wanted = torch.randn(6, 5, dtype=F64)
    found = Backwards().fit_up(factors, wanted)
    torch.testing.assert_close(found, torch.linalg.pinv(factors[0]) @ wanted)


def test_of_an_svd_that_is_the_weight_times_the_inverse_of_down() -> None:
    model = nn.Sequential(nn.Linear(12, 10)).double()
    average = moved(copy.deepcopy(model))
    before = weights(average)["0"]
    change(model, LowRank(3), average)
    layer = average[0]
    assert torch.equal(layer.down, model[0].down) and layer.down is not model[0].down
    torch.testing.assert_close(layer.up.detach(), before @ torch.linalg.pinv(layer.down.detach()))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("form", [FullRank(), Adapted(2)], ids=["full-rank", "adapted"])
def test_other_changes_keep_the_averages_weight(decomposition: str, form: Form) -> None:
    model = conv().double()
    average = copy.deepcopy(model)
    change(model, LowRank(2, decomposition), average)
    moved(average)
    before = weights(average)["0"]
    after = Adapted(2, decomposition) if isinstance(form, Adapted) else form
    change(model, after, average)
    torch.testing.assert_close(weights(average)["0"], before, atol=1e-12, rtol=0)
    change(moved(model), Adapted(2, decomposition, restart=1), moved(average))
    assert torch.equal(average[0].down, model[0].down)
    assert not torch.equal(average[0].base, model[0].base)


@pytest.mark.parametrize("form", [FullRank(), LowRank(3), Adapted(3)], ids=str)
def test_averaging_goes_on_to_the_model_at_its_own_rate(form: Form) -> None:
    # A <- d A + (1 - d) W of the effective weights, exactly: the basis is shared.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    ema = ema_of(moved(model))
    ema.update_parameters(model)
    moved(ema.module)
    change(model, form, ema.module)
    apart = weights(ema.module)["0"] - weights(model)["0"]
    for k in range(1, 20):
        ema.update_parameters(model)
        now = weights(ema.module)["0"] - weights(model)["0"]
        torch.testing.assert_close(now, DECAY**k * apart)


def test_faint_directions_of_the_basis_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    with torch.no_grad():  # of rank 2, but for rounding
        model[0].weight.copy_(torch.randn(12, 2, dtype=F64) @ torch.randn(2, 12, dtype=F64))
        model[0].weight.add_(torch.randn(12, 12, dtype=F64), alpha=1e-9)
    average = moved(copy.deepcopy(model))
    change(model, LowRank(6), average)
    assert average[0].up.norm() < 10 * model[0].up.norm()


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_bias_follows_a_calibrated_truncation(side: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 16) if side == "input" else nn.Linear(16, 8)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(layer.out_features, 4)).double()
    average, equal = moved(copy.deepcopy(model), 0.02), copy.deepcopy(model)
    data = [torch.randn(64, layer.in_features, dtype=F64) + 2 for _ in range(4)]
    x, biases = torch.cat(data), [one[0].bias.detach().clone() for one in (model, average)]
    mean = average[0](x).detach().mean(0)
    calibration = dr.calibrate(model, data)
    assert calibration["0"].side == side
    change(model, {"0": LowRank(3)}, average, equal, calibration=calibration)
    same(model, equal)
    pairs = zip((model, average), biases, strict=True)
    ours, theirs = (one[0].bias.detach() - bias for one, bias in pairs)
    assert ours.norm() > 0.1
    if side == "input":
        torch.testing.assert_close(average[0](x).detach().mean(0), mean)
    else:  # its mean outputs are not known: the model's are near
        torch.testing.assert_close(theirs, ours)


def test_a_tied_weight_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

    model = Tied().double()
    average = moved(copy.deepcopy(model))
    for form in (LowRank(2), FullRank(), Adapted(2)):
        change(model, form, average)
        tied = [*average.embed.named_parameters()]
        assert all(p is dict(average.head.named_parameters())[name] for name, p in tied)
        same(average.embed, average.head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_average_keeps_its_own_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    average = copy.deepcopy(model).float()
    for form in (LowRank(3), FullRank(), Adapted(3)):
        change(model, form, average)
        assert {p.dtype for p in average.parameters()} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {dtype}
        trains = [name for name, p in average.named_parameters() if p.requires_grad]
        assert trains == [name for name, p in model.named_parameters() if p.requires_grad]


# Whole runs.


class TimmLike(nn.Module):
    """As timm's ModelEmaV2: entries of the states, in their order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for own, other in pairs:
            own.copy_(DECAY * own + (1 - DECAY) * other)


class ByName(nn.Module):
    """As ema_pytorch: the model is in a list, and parameters are averaged by remembered names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.online_model, self.ema_model = [model], copy.deepcopy(model).requires_grad_(False)
        self.parameter_names = {name for name, _ in self.ema_model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        others = dict(self.online_model[0].named_parameters())
        for name, p in self.ema_model.named_parameters():
            if name in self.parameter_names:
                p.lerp_(others[name], 1 - DECAY)


class ByHand:
    """A copy that a loop averages itself."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for own, other in zip(self.shadow.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 1 - DECAY)


class Torch(AveragedModel):
    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "multi": lambda m: Torch(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "single": lambda m: Torch(m, avg_fn=get_ema_avg_fn(DECAY)),
    "buffers": lambda m: Torch(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True),
    "timm": TimmLike,
    "by name": ByName,
    "by hand": ByHand,
}


def inner(ema: Any) -> nn.Module:
    found = [getattr(ema, name, None) for name in ("module", "ema_model", "shadow")]
    return next(one for one in found if one is not None)


def run(
    to: str, make: Callable[[nn.Module], Any], *, early: bool = False, steps: int = STEPS
) -> tuple[nn.Module, Any, list[float]]:
    """24 steps with an average that is made early (of the plain model) or not; how far it is off.

    That is the distance of its weights from an fp64 average of the effective weights, as a share
    of their distance from the model's.
    """
    model = mlp()
    optimizer, ema = adamw(model), make(model) if early else None
    ranks = ranks_of(model, optimizer, to)
    ema = ema or make(model)
    ranks.follow(ema)
    exact, off = weights(model), list[float]()
    for batch in batches()[:steps]:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        ema.update(model)
        now, average = weights(model), weights(inner(ema))
        first = len(off) == 0 and isinstance(ema, AveragedModel)
        for path, weight in now.items():
            exact[path] = weight if first else exact[path].lerp(weight, 1 - DECAY)
        distance = sum(float((average[p] - exact[p]).norm()) for p in exact)
        off.append(distance / (sum(float((now[p] - exact[p]).norm()) for p in exact) or 1.0))
    return model, ema, off


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_average_goes_through_a_run(way: str, to: str) -> None:
    model, ema, off = run(to, WAYS[way])
    average = inner(ema)
    assert [s.form for s in dr.survey(average)] == [s.form for s in dr.survey(model)]
    assert [n for n, _ in average.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert max(off[:DEFLATE]) < 0.5  # products of averages are no averages of products
    assert max(off) < 1.0
    if isinstance(ema, AveragedModel):
        assert int(ema.n_averaged) == STEPS
    dr.check(model, ema=average)


@pytest.mark.parametrize("to", ENDINGS)
def test_equally_weighted_averages_and_those_made_before_the_first_plan(to: str) -> None:
    model, ema, _ = run(to, Torch, early=True)
    assert [s.form for s in dr.survey(ema.module)] == [s.form for s in dr.survey(model)]
    assert cross_entropy(ema(batches()[0][0]), batches()[0][1]).isfinite()


def test_several_averages_follow_each_once() -> None:
    model = mlp()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer)
    averages = [ema_of(model), ema_of(model, use_buffers=True)]
    for one in (*averages, averages[0]):
        ranks.follow(one)
    assert len(ranks.averages.holders) == 2
    train(model, optimizer, ranks, averages, INFLATE)
    assert [dr.survey(one.module)[0].form for one in averages] == [FullRank()] * 2


def train(
    model: nn.Module,
    optimizer: Any,
    ranks: RankScheduler,
    averages: list[AveragedModel],
    until: int = STEPS,
) -> None:
    for batch in batches()[ranks.last_step : until]:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        for one in averages:
            one.update_parameters(model)


def started(to: str = "adapted", **more: Any) -> tuple[nn.Module, Any, RankScheduler, Any]:
    model = mlp()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer, to, **more)
    ranks.follow(ema := ema_of(model))
    return model, optimizer, ranks, ema


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("at", [4, 20])
def test_a_saved_run_goes_on_with_its_average(to: str, at: int, tmp_path: Path) -> None:
    model, optimizer, ranks, ema = started(to)
    train(model, optimizer, ranks, [ema], at)
    dr.save(tmp_path / "one", model=model, optimizer=optimizer, ranks=ranks, ema=ema)
    states = copy.deepcopy([one.state_dict() for one in (model, optimizer, ranks, ema)])
    train(model, optimizer, ranks, [ema])

    other = started(to)
    kinds = dict(zip(("model", "optimizer", "ranks", "ema"), other, strict=True))
    dr.load(tmp_path / "one", **kinds)
    train(*other[:3], [other[3]])
    again = mlp()
    second, average = adamw(again), ema_of(mlp())
    resumed = ranks_of(again, second, to, state=states[2])
    resumed.follow(average)
    for one, state in zip((again, second, average), (*states[:2], states[3]), strict=True):
        one.load_state_dict(state)
    train(again, second, resumed, [average])
    for own, its in ((model, ema), (other[0], other[3]), (again, average)):
        assert int(its.n_averaged) == STEPS
        for p, q in zip(ema.parameters(), its.parameters(), strict=True):
            assert torch.equal(p, q)
        assert all(map(torch.equal, own.parameters(), model.parameters()))


def test_loading_a_position_brings_the_average_along() -> None:
    model, optimizer, ranks, ema = started()
    train(model, optimizer, ranks, [ema], 4)
    states = copy.deepcopy([one.state_dict() for one in (model, optimizer, ranks, ema)])
    train(model, optimizer, ranks, [ema], 12)
    ranks.load_state_dict(states[2])
    assert dr.survey(ema.module)[0].form == LowRank(4)
    for one, state in zip((model, optimizer, ema), (states[0], states[1], states[3]), strict=True):
        one.load_state_dict(state)
    train(model, optimizer, ranks, [ema])
    assert isinstance(dr.survey(ema.module)[0].form, Adapted)


def test_an_average_of_the_plain_model_takes_a_state_of_any_form() -> None:
    model, average = mlp(), ema_of(mlp())
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer)
    ranks.follow(average)
    train(model, optimizer, ranks, [average], INFLATE)
    fresh, plain = mlp(), ema_of(mlp())
    ranks_of(fresh, adamw(fresh)).follow(plain)
    plain.load_state_dict(average.state_dict())
    same(average.module, plain.module)
    assert dr.survey(plain)[0].form == FullRank()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_follow_their_own(way: str) -> None:
    model, optimizer, ranks, _ = started()
    average = copy.deepcopy(model)
    ranks.averages = Averages()
    ranks.follow(average)
    parts = (model, optimizer, ranks, average)
    copied = copy.deepcopy(parts) if way == "deepcopy" else pickle.loads(pickle.dumps(parts))
    assert copied[2].averages.holders[0] is copied[3]
    train(*copied[:3], [])
    assert isinstance(dr.survey(copied[3])[0].form, Adapted)
    assert isinstance(dr.survey(average)[0].form, LowRank)


def test_an_average_that_nobody_has_is_not_kept() -> None:
    model, optimizer, ranks, _ = started()
    average, held = ref(copy.deepcopy(model)), copy.deepcopy(model)
    ranks.follow(copy.deepcopy(model))
    ranks.follow(held)
    ranks.follow(SimpleNamespace(inside=held))
    ranks.follow(callback := SimpleNamespace(ema=copy.deepcopy(model)))
    callback.ema = None
    gc.collect()
    assert average() is None
    train(model, optimizer, ranks, [], INFLATE)
    assert dr.survey(held)[0].form == FullRank()
    assert held in ranks.averages.copies(model) and len(ranks.averages.copies(model)) == 2


def test_an_average_that_cannot_be_pickled_is_named() -> None:
    _, _, ranks, _ = started()
    with pytest.raises(TypeError, match="averages"):
        pickle.dumps(ranks)
    copy.deepcopy(ranks)


# All or nothing.


def test_a_layer_whose_average_is_not_finite_is_postponed_in_both() -> None:
    model, optimizer, ranks, ema = started()
    train(model, optimizer, ranks, [ema], INFLATE - 1)
    with torch.no_grad():
        value = ema.module[0].up[0, 0].clone()
        ema.module[0].up[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="layer '0': its average holds NaN"):
        train(model, optimizer, ranks, [], INFLATE)
    for one in (model, ema.module):
        assert isinstance(one[0].form, LowRank) and isinstance(one[2].form, FullRank)
    with torch.no_grad():
        ema.module[0].up[0, 0] = value
    train(model, optimizer, ranks, [ema], INFLATE + 1)
    assert isinstance(ema.module[0].form, FullRank) and isinstance(model[0].form, FullRank)


@pytest.mark.parametrize("where", ["preparing", "committing"])
def test_an_error_in_the_average_leaves_both(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ranks, ema = started()
    by_name = ByName(model)
    ranks.follow(by_name)
    train(model, optimizer, ranks, [ema], INFLATE - 1)
    before = [{n: id(p) for n, p in one.named_parameters()} for one in (model, ema, by_name)]
    average = ema.module[2]
    commit = Edit.commit

    def fails(edit: Edit, *rest: Any) -> None:
        commit(edit, *rest)
        if edit.site.module is average:
            raise OSError("no memory")

    def prepares(edit: Edit, *rest: Any) -> Edit:
        raise OSError("no memory")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no memory"):
        if where == "committing":
            patch.setattr(Edit, "commit", fails)
        else:
            patch.setattr(average_edits_module, "_edit", prepares)
        train(model, optimizer, ranks, [], INFLATE)
    after = [{n: id(p) for n, p in one.named_parameters()} for one in (model, ema, by_name)]
    assert before == after
    assert by_name.parameter_names == {*before[2]}.__class__(
        n.removeprefix("ema_model.") for n in before[2]
    )
    assert isinstance(model[0].form, LowRank) and isinstance(average.form, LowRank)


# BatchNorm.


def test_the_average_gets_the_recalibrated_statistics() -> None:
    torch.manual_seed(0)
    data = [torch.randn(32, 16) for _ in range(4)]
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = adamw(model)
    callback = BatchNormRecalibration(lambda: data)
    ranks = RankScheduler(
        model, optimizer, schedule("low-rank"), STEPS, layers=["0"], callbacks=[callback]
    )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    ranks.follow(ema)
    for batch in batches()[: DEFLATE - 1]:
        loss_of(model, batch).backward()
        optimizer.step()
        ranks.step()
        ema.update_parameters(model)
    assert not torch.equal(ema.module[1].running_var, model[1].running_var)
    optimizer.step()
    assert ranks.step()
    assert torch.equal(ema.module[1].running_var, model[1].running_var)
    assert ema.module[1].running_var is not model[1].running_var
    update_bn(data, ema)
    assert not torch.equal(ema.module[1].running_var, model[1].running_var)


# What cannot be followed.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: [p.clone() for p in m.parameters()], TypeError, "got list.*lists or dict"),
        (lambda m: dict(m.named_parameters()), TypeError, "got dict.*copy.deepcopy"),
        (lambda m: m, ValueError, "is the model itself"),
        (lambda m: nn.Sequential(m), ValueError, "holds it"),
        (lambda m: mlp()[:3], TypeError, "none is found"),
    ],
)
def test_what_is_no_copy_is_refused(make: Any, error: type[Exception], message: str) -> None:
    model = mlp()
    ranks = ranks_of(model, adamw(model))
    with pytest.raises(error, match=message):
        ranks.follow(make(model))
    assert ranks.averages.holders == []


def test_an_average_in_the_models_memory_is_refused() -> None:
    model = mlp()
    ranks, shares = ranks_of(model, adamw(model)), copy.deepcopy(model)
    for own, other in zip(shares.parameters(), model.parameters(), strict=True):
        own.data = other.data
    with pytest.raises(ValueError, match="shares memory"):
        ranks.follow(shares)


@pytest.mark.usefixtures("frozen_objects_too")
def test_a_list_of_the_averages_old_parameters_is_found() -> None:
    model, optimizer, ranks, ema = started()
    kept = list(ema.module.parameters())
    gc.freeze()  # as training loops do to save collections
    train(model, optimizer, ranks, [ema], INFLATE)
    with pytest.raises(RuntimeError, match=f"a list of {len(kept)} still holds"):
        train(model, optimizer, ranks, [ema], INFLATE + 1)


# Averages that do not follow.

PLANS: dict[str, list[Mapping[str, Form]]] = {
    "inflated": [{"0": FullRank()}],
    "from rank 1": [{"0": LowRank(1)}, {"0": FullRank()}],
    "another restart": [{"0": Adapted(2)}, {"0": Adapted(2, restart=1)}],
    "another alpha": [{"0": Adapted(2)}, {"0": Adapted(2, alpha=1.0)}],
    "another basis": [{"0": LowRank(2)}, {"0": FullRank()}, {"0": LowRank(2)}],
}


@pytest.mark.parametrize("case", PLANS)
def test_torchs_average_that_was_left_behind_is_refused(case: str) -> None:
    first, *changes = [{"0": LowRank(4)}, *PLANS[case]] if case == "inflated" else PLANS[case]
    model = mlp()
    dr.apply_plan(model, first)
    ema = ema_of(model)
    ema.update_parameters(model)
    for plan in changes:
        dr.apply_plan(model, plan)
    before = copies_of(ema.parameters())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer '0' .*ranks\.follow\(ema\)"):
            ema.update_parameters(model)
    assert int(ema.n_averaged) == 1
    assert all(map(torch.equal, ema.parameters(), before))
    ranks = RankScheduler(model, adamw(model), lambda clock, readings: {}, 10, layers=["0"])
    ranks.follow(ema)
    ema.update_parameters(model)


def test_so_it_is_under_a_rank_scheduler_and_in_a_copy() -> None:
    model = mlp()
    optimizer, ema = adamw(model), ema_of(model)
    ranks = ranks_of(model, optimizer)
    with pytest.raises(RuntimeError, match="in the model"):
        train(model, optimizer, ranks, [ema], 1)
    later = ema_of(model)
    train(model, optimizer, ranks, [later], INFLATE - 1)
    with pytest.raises(RuntimeError, match=r"LowRank.* there and full-rank in the model"):
        train(model, optimizer, ranks, [later], INFLATE)
    parts = copy.deepcopy((model, later))
    with pytest.raises(RuntimeError, match="in the model"):
        parts[1].update_parameters(parts[0])


def test_other_averages_are_left_alone() -> None:
    one, other = mlp(), mlp(1)
    dr.factorize(other, 4)
    averages = [ema_of(other), ema_of(other)]
    optimizer = adamw(one)
    ranks = ranks_of(one, optimizer)
    own = [ema_of(nn.Linear(3, 3))]
    train(one, optimizer, ranks, [], STEPS)
    for ema in averages:
        ema.update_parameters(other)
        ema.update_parameters(moved(other))
    own[0].update_parameters(nn.Linear(3, 3))


def test_an_average_loaded_with_its_model_is_accepted() -> None:
    model = dr.factorize(mlp(), 4)
    ema = ema_of(model)
    ema.update_parameters(model)
    states = copy.deepcopy((model.state_dict(), ema.state_dict()))
    dr.inflate(model)
    model.load_state_dict(states[0])
    ema.load_state_dict(states[1])
    ema.update_parameters(moved(model))
    assert int(ema.n_averaged) == 2


@pytest.mark.parametrize("way", ["parameter", "data"])
def test_a_copy_that_is_averaged_by_hand_is_told(way: str) -> None:
    model = mlp()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer)
    average, teacher = ByHand(model), copy.deepcopy(model)
    train(model, optimizer, ranks, [], INFLATE)
    bias = average.shadow[0].bias
    with torch.no_grad():
        (bias.data if way == "data" else bias).lerp_(model[0].bias, 0.1)
    with pytest.warns(RuntimeWarning, match=r"was written to after a change.*ranks\.follow"):
        train(model, optimizer, ranks, [], INFLATE + 1)
    train(model, optimizer, ranks, [])
    assert teacher[0].form == LowRank(4)


@pytest.mark.parametrize("follows", [False, True])
def test_a_momentum_encoder_inside_the_model_is_told(follows: bool) -> None:
    whole = nn.ModuleDict({"q": mlp(), "k": mlp().requires_grad_(False)})
    optimizer = adamw(whole["q"])
    ranks = RankScheduler(
        whole["q"] if follows else whole, optimizer, schedule("low-rank"), STEPS, layers="*"
    )
    if follows:
        ranks.follow(whole["k"])
    told = list[int]()
    for step, batch in enumerate(batches()):
        loss_of(whole["q"], batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ranks.step()
        told += [step for one in caught if "RankScheduler(model.part" in str(one.message)]
        for own, its in zip(whole["k"].parameters(), whole["q"].parameters(), strict=True):
            own.data.mul_(DECAY).add_(its.data, alpha=1 - DECAY)
    assert told == ([] if follows else [DEFLATE])
    assert not any(p.requires_grad for p in whole["k"].parameters())


def test_another_model_in_training_is_not() -> None:
    model = mlp()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer)
    twin = copy.deepcopy(model)
    its = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in batches():
        for one, trains in ((model, optimizer), (twin, its)):
            loss_of(one, batch).backward()
            trains.step()
            trains.zero_grad()
        ranks.step()


def test_a_guarded_average_is_saved_and_loaded_whole() -> None:
    model, optimizer, ranks, _ = started()
    ema = AveragedModel(model)
    ranks.follow(ema)
    train(model, optimizer, ranks, [ema], INFLATE)
    file = io.BytesIO()
    torch.save((model, ema), file)
    file.seek(0)
    other, average = torch.load(file, weights_only=False)
    average.update_parameters(other)
    assert int(average.n_averaged) == INFLATE + 1


# Wrappers, and several processes.


@pytest.mark.parametrize("wrap", ["compiled", "data parallel", "compiled average"])
def test_wrapped_models_and_averages_follow(wrap: str) -> None:
    model = mlp()
    optimizer, ranks = adamw(model), None
    outside: Any = nn.DataParallel(model) if wrap == "data parallel" else model
    outside = torch.compile(model, backend="eager") if wrap == "compiled" else outside
    ranks = ranks_of(outside, optimizer)
    ema = ema_of(outside)
    if wrap == "compiled average":
        ema.module.compile(backend="eager")
    ranks.follow(ema)
    for batch in batches():
        loss_of(outside, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        ema.update_parameters(outside)
        with torch.no_grad():
            assert loss_of(ema, batch).isfinite()
    assert next(type(s.form) for s in dr.survey(ema.module)) is Adapted


def in_processes(only_first: bool) -> list[float]:
    model = DistributedDataParallel(mlp())
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer, "low-rank")
    with pytest.raises(ValueError, match=r"AveragedModel\(model\.module\)"):
        ranks.follow(AveragedModel(model))
    ema = None if only_first and dist.get_rank() else ema_of(model.module)
    if ema is not None:
        ranks.follow(ema)
    for batch in batches():
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        if ema is not None:
            ema.update_parameters(model)
    return [] if ema is None else [float(p.double().norm()) for p in ema.parameters()]


@pytest.mark.slow
def test_each_process_has_its_own_average_or_only_the_first_has_one(processes: Any) -> None:
    both, first = (processes(2)(in_processes, only) for only in (False, True))
    assert both[0] == pytest.approx(both[1]) and first[1] == []
    assert first[0] == pytest.approx(both[0])


def test_a_gradient_is_there_where_the_rank_scheduler_is_called_first() -> None:
    model = mlp()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer)
    for batch in batches():
        loss_of(model, batch).backward()
        if ranks.step():
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is not None for p in trained)
            before = copies_of(trained)
            optimizer.step()
            assert not any(map(torch.equal, trained, before))
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert ranks.last_step == STEPS - 1  # the last step is counted by the next call
