"""The headroom probe: known answers on teachers, what is refused, what is left as it was."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import dynarank as dr
from dynarank.planning.headroom import RATES, runs

WIDTH, BATCH = 32, 32


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def teacher(rank: int, batches: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Noisy outputs of a linear teacher."""
    torch.manual_seed(1)
    weight = torch.randn(WIDTH, rank) @ torch.randn(rank, WIDTH) / WIDTH
    inputs = torch.randn(batches * BATCH, WIDTH)
    outputs = inputs @ weight.T + 0.1 * torch.randn(len(inputs), WIDTH)
    return list(zip(inputs.split(BATCH), outputs.split(BATCH), strict=True))


def probe(batches: Any, make_model: Callable[[], nn.Module] = linear, **options: Any) -> Any:
    given = {"loss": squares, "optimizer": adam, "ranks": 4, "steps": 40, "layers": "0", "seeds": 1}
    return dr.headroom(make_model, batches, **(given | options))


def test_low_rank_is_enough_for_a_low_rank_teacher() -> None:
    found = probe(teacher(rank=2), steps=60)
    assert found.verdict == "no gap" and found.needed_rank == 4
    assert found.sentence.startswith("No gap")


def test_capacity_binds_on_a_full_rank_teacher() -> None:
    found = probe(teacher(rank=WIDTH), ranks=(8, 2), seeds=2)
    assert found.verdict == "none" and found.needed_rank is None
    assert [one.rank for one in found.ranks] == [2, 8]  # cheapest first
    assert [one.verdict for one in found.ranks] == ["none", "none"]
    assert found.ranks[0].gap > found.ranks[1].gap > 10 * found.ranks[1].gap_error
    assert "use fixed low rank" in found.sentence


def test_headroom_where_the_rank_suffices_but_factors_learn_more_slowly() -> None:
    found = probe(teacher(rank=6), ranks=6, steps=20, seeds=2)
    assert found.verdict == "headroom" and found.needed_rank == 6
    assert found.deciding.share - found.deciding.share_error > 0.5
    assert found.sentence.startswith("Headroom: at rank 6")


def test_each_arm_counts_at_its_best_rate() -> None:
    """At a third of the rate that suits full rank, all arms want more; losses are the best ones."""
    slow = probe(teacher(rank=8), ranks=8, steps=16, optimizer=lambda p: torch.optim.Adam(p, 2e-4))
    assert [arm.rate for arm in (slow.full, slow.ranks[0].low, slow.ranks[0].cut)] == [3.0] * 3
    fast = probe(teacher(rank=8), ranks=8, steps=16, optimizer=lambda p: torch.optim.Adam(p, 1.0))
    assert fast.full.rate == min(RATES)


def test_the_number_of_runs_is_known_and_told() -> None:
    told: list[tuple[int, int]] = []
    probe(teacher(rank=2), ranks=(2, 4), steps=10, seeds=2, progress=lambda *two: told.append(two))
    assert told == [(i + 1, runs(2, 2)) for i in range(runs(2, 2))]


def test_the_same_call_finds_the_same_and_leaves_the_random_states() -> None:
    def make_model() -> nn.Module:
        random.random()
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    batches = teacher(rank=4)
    kept = copy.deepcopy(batches)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    one = probe(batches, make_model, steps=10)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.rand(3)
    assert probe(batches, make_model, steps=10).to_data() == one.to_data()
    for batch, same in zip(batches, kept, strict=True):
        assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])


def test_the_random_states_are_restored_after_an_error() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("the loss fails")

    batches = teacher(rank=4)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the loss fails"):
        probe(batches, loss=broken)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_batches_are_not_trained_on() -> None:
    batches = teacher(rank=4)
    trained: set[int] = set()
    compared: set[int] = set()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        (trained if model.training else compared).add(id(batch))
        return squares(model, batch)

    probe(batches, loss=loss, steps=20, ranks=8)
    calibrated = {id(batch) for batch in batches} & compared & trained
    assert len(calibrated) <= 4 and len(compared - trained) == 4 and len(trained) == 12


def test_all_kinds_of_loaders() -> None:
    batches = teacher(rank=4)
    found = [
        probe(given, steps=10, evaluate=batches[12:])
        for given in (batches[:12], lambda: iter(batches[:12]), iter(batches[:12]))
    ]
    assert found[0].to_data() == found[1].to_data() == found[2].to_data()
    assert found[0].full.losses.shape == (1, 4)


class Words(nn.Module):
    """Embedding, attention, an LSTM and an output layer tied to the embedding; dict batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        x = self.embedding(tokens)
        x = self.lstm(x + self.attention(x, x, x)[0])[0]
        return _Output(F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


class _Output(NamedTuple):
    loss: Tensor


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "separable"])
def test_convolutions_with_batch_norm(decomposition: str) -> None:
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(6)]
    found = dr.headroom(
        convolutions, batches, ranks=0.5, steps=10, seeds=1, decomposition=decomposition
    )
    assert found.ranks[0].cost < 1 and found.full.losses.isfinite().all()


def test_dicts_tied_weights_attention_and_recurrence() -> None:
    tokens = [torch.randint(40, (4, 6)) for _ in range(6)]
    batches = [{"tokens": t, "labels": t} for t in tokens]
    found = dr.headroom(Words, batches, ranks=(0.25, 0.5), steps=10, seeds=1)
    assert [one.rank for one in found.ranks] == [0.25, 0.5]


def test_a_loss_may_take_the_labels_out_of_a_dict() -> None:
    batches = [{"inputs": x, "labels": y} for x, y in teacher(rank=4)]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return F.mse_loss(model(batch["inputs"]), labels)

    probe(batches, loss=loss, steps=10, sample=batches[0]["inputs"])
    assert all("labels" in batch for batch in batches)


def test_frozen_parameters_double_precision_and_learning_rates_that_are_tensors() -> None:
    def make_model() -> nn.Module:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).double()
        model[1].requires_grad_(False)
        return model

    def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
        assert len(parameters) == 2
        return torch.optim.Adam(parameters, lr=torch.tensor(0.01), capturable=False, foreach=False)

    batches = [(x.double(), y.double()) for x, y in teacher(rank=4)]
    assert probe(batches, make_model, optimizer=optimizer, steps=10).full.losses.isfinite().all()


def never(parameters: list[nn.Parameter]) -> Optimizer:
    made = adam(parameters)
    made.register_step_pre_hook(lambda *_: pytest.fail("trained before the refusal"))
    return made


SHARED = linear()
CLASSES = [(torch.randn(4, WIDTH), torch.randn(4, 3)) for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"batches": []}, ValueError, "0 batches to train on"),
        ({"batches": teacher(2)[:1]}, ValueError, "both must be at least 1"),
        ({"evaluate": []}, ValueError, "there are 0 to compare"),
        ({"make_model": lambda: SHARED}, ValueError, "the same model twice"),
        ({"make_model": SHARED}, TypeError, "make_model is a function.*deepcopy"),
        ({"make_model": lambda: 3}, TypeError, "must return a module, got int"),
        ({"make_model": lambda: dr.factorize(linear(), 4)}, ValueError, "'0' has factors"),
        ({"make_model": nn.PReLU, "layers": None}, ValueError, "no weights"),
        ({"layers": "1"}, ValueError, "'1'"),
        ({"ranks": ()}, ValueError, "at least one rank"),
        ({"ranks": 32}, ValueError, "nothing to gain"),
        ({"ranks": 64}, ValueError, "64"),
        ({"steps": 3}, ValueError, "steps is a whole number >= 10, got 3"),
        ({"seeds": 0}, ValueError, "seeds is a whole number >= 1, got 0"),
        ({"loss": lambda m, b: m(b[0])}, TypeError, r"scalar tensor, got \(32, 32\)"),
        ({"loss": lambda m, b: 1.0}, TypeError, "scalar tensor, got float"),
        ({"loss": lambda m, b: squares(m, b) * float("nan")}, ValueError, "nan, before any"),
        ({"loss": lambda m, b: torch.ones(())}, ValueError, "no gradient"),
        ({"loss": None, "batches": CLASSES}, ValueError, "give loss="),
        ({"decomposition": "none"}, ValueError, "none"),
    ],
)  # fmt: skip
def test_refused_by_name_before_any_training(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    options = dict(options)
    with pytest.raises(error, match=says):
        probe(options.pop("batches", teacher(2)), **({"optimizer": never} | options))


def test_divergence_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"full rank diverged within 20 steps.*lower it"):
        probe(teacher(4), steps=20, optimizer=lambda p: torch.optim.SGD(p, 1e4))


def test_text_and_data() -> None:
    found = probe(teacher(rank=8), ranks=(dr.Rank(0.25, "min"), 0.25), steps=10, seeds=2)
    assert all(len(line) <= 80 for line in str(found).splitlines())
    data = json.loads(json.dumps(found.to_data(), allow_nan=False))
    assert data["verdict"] == found.verdict and data["sentence"] in " ".join(str(found).split())
    assert {"value": 0.25, "of": "min", "multiple_of": 1} in [r["rank"] for r in data["ranks"]]
