"""The figures of the paper's first experiment, predicted and counted; costs of whole schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.cost.flops import count_flops, form_parameters, trace
from dynarank.cost.schedule import cost_schedule
from dynarank.forms import Form
from dynarank.layers import WeightSpec
from dynarank.schedules import dynamic_rank, full_rank, low_rank
from dynarank.train.models import ResNet20

HALF = Rank(0.5, of="out")
BATCH = torch.empty(128, 3, 32, 32, device="meta")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.device("meta"):
        return ResNet20()


@pytest.fixture(scope="module")
def convs(resnet: nn.Module) -> list[str]:
    return [site.path for site in dr.survey(resnet) if site.module.weight.shape[-1] == 3]


@pytest.mark.parametrize(
    ("form", "expected", "tolerance"),
    [
        (FullRank(), 1.0, 0.0),
        (LowRank(HALF), 0.567, 0.003),
        (Adapted(HALF, execution="two-branch"), 1.22, 0.01),
        (Adapted(HALF, execution="merged"), 1.0, 0.01),
    ],
    ids=str,
)
def test_resnet20_relative_training_flops(
    resnet: nn.Module, convs: list[str], form: Form, expected: float, tolerance: float
) -> None:
    """Predicted from the full-rank model, and counted on the model in that form."""
    use = trace(resnet, BATCH)
    plan = dict.fromkeys(convs, form)
    real = ResNet20()
    dr.apply_plan(real, plan)
    predicted, counted = use.flops(plan), count_flops(real.to("meta"), BATCH)
    assert len(convs) == 19
    assert predicted == counted
    assert counted.training / use.flops({}).training == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"execution": "two-branch"}, 0.885),
        ({"execution": "merged"}, 0.840),
        ({"to": "low-rank"}, 0.753),
    ],
    ids=str,
)
def test_the_published_schedule_costs_what_it_costs(
    resnet: nn.Module, convs: list[str], options: dict[str, str], expected: float
) -> None:
    schedule = dynamic_rank(HALF, inflate=55 / 150, deflate=120 / 150, **options)  # type: ignore[arg-type]
    cost = cost_schedule(trace(resnet, BATCH), schedule, convs, 150 * 390)
    assert [phase.phase.steps for phase in cost.phases] == [55 * 390, 65 * 390, 30 * 390]
    assert cost.relative_training == pytest.approx(expected, abs=0.005)
    assert cost.mean_trainable == pytest.approx(206_127, abs=1)
    assert cost.peak_trainable == 272_762
    assert [phase.trainable_parameters for phase in cost.phases] == [155_170, 272_762, 155_170]


def test_the_ends_of_the_scale(resnet: nn.Module, convs: list[str]) -> None:
    use = trace(resnet, BATCH)
    assert cost_schedule(use, full_rank(), convs, 10).relative_training == 1.0
    low = cost_schedule(use, low_rank(HALF), convs, 10)
    assert low.relative_training == pytest.approx(0.567, abs=0.003)
    assert low.mean_trainable == low.peak_trainable == 155_170
    assert low.phases[0].state_bytes == 155_170 * 4 * 3


def test_counting_leaves_the_model_alone() -> None:
    model = ResNet20()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    trace(model, torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


class Attention(nn.Module):
    """A model most of whose work is outside its ranked layers, with one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.twice = nn.Linear(32, 32)
        self.stem = nn.Conv1d(8, 32, 3, padding=1)
        self.frozen = nn.Linear(32, 32)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.stem(x).transpose(1, 2)
        x = self.twice(self.twice(self.inner(x * scale)))
        return {"out": self.frozen(x), "length": torch.tensor(x.shape[1])}


@pytest.mark.parametrize(
    "form", [LowRank(4), Adapted(4), Adapted(4, execution="two-branch"), FullRank()], ids=str
)
@pytest.mark.parametrize("named", [False, True])
def test_the_rest_of_a_model_is_counted_too(form: Form, named: bool) -> None:
    """Compared on meta tensors: FlopCounterMode does not know the CPU's fused attention."""
    model, x = Attention(), torch.empty(2, 8, 10, device="meta")
    sample = {"x": x, "scale": 2.0} if named else (x,)
    use = trace(model, sample)
    plan = {"inner.linear1": form, "twice": form, "frozen": form}
    predicted, parameters = use.flops(plan), use.parameters(plan)
    assert use.rest.training > 0
    dr.apply_plan(model, plan)
    assert count_flops(copy.deepcopy(model).to("meta"), sample) == predicted
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == (trainable, sum(p.numel() for p in model.parameters()))


def test_a_layer_called_by_keyword_is_costed() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    model, x = Named(), torch.randn(4, 8)
    predicted = trace(model, x).flops({"inner": LowRank(2)})
    dr.factorize(model, 2)
    assert count_flops(model, x) == predicted


def test_a_loss_of_the_users_own_decides_what_runs_backward() -> None:
    model, x = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), torch.randn(4, 8)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.parts["a"](x), self.parts["b"](x)

    both, one = count_flops(Two(), x), count_flops(Two(), x, lambda out: out[0].sum())
    assert both.forward == one.forward and both.training > one.training


@pytest.mark.parametrize("form", [FullRank(), LowRank(3), Adapted(3)], ids=str)
def test_parameters_of_a_form(form: Form) -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False)
    dr.apply_plan(layer, {"": form})
    sizes = [(p.numel(), p.requires_grad) for p in layer.parameters()]
    expected = (sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))
    assert form_parameters(WeightSpec("weight", (6, 4, 3, 3)), form) == expected


def test_the_phase_that_costs_more_than_full_rank_is_known() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    use = trace(model, torch.zeros(32, 64))
    cost = cost_schedule(
        use, dynamic_rank(HALF, inflate=0.37, deflate=0.8, execution="two-branch"), ["0", "1"], 100
    )
    assert [phase.adapted_costs_more for phase in cost.phases] == [False, False, True]
    assert cost.at(0) is cost.phases[0]
    assert cost.at(36) is cost.phases[0] and cost.at(37) is cost.phases[1]
    assert cost.at(99) is cost.phases[2]
