"""Calls that no gradient reaches have no backward pass: predicted as FlopCounterMode counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import over
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost import ModelUse, count_flops, trace
from dynarank.decompositions import Geometry
from dynarank.forms import Form
from dynarank.layers import Call
from dynarank.layers.linear import RankedLinear
from dynarank.schedules import dynamic_rank

Run = Callable[[Any, Tensor], Any]
Loss = Callable[[Any], Tensor]
N = 16
FORMS = [LowRank(4), Adapted(4), Adapted(4, execution="two-branch")]


class Net(nn.Module):
    """A few linear layers; ``run`` is the forward pass."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.last = run, None
        self.a, self.b, self.c, self.tied = (nn.Linear(N, N) for _ in range(4))
        self.frozen = nn.Linear(N, N).requires_grad_(False)
        self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Layers(Net):
    """With layers of other kinds."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.conv, self.wide = nn.Conv1d(N, N, 3, padding=1), nn.ConvTranspose1d(N, N, 3)
        self.table = nn.Embedding(24, N)
        self.mha = nn.MultiheadAttention(N, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(N, 2, N, batch_first=True, dropout=0.0)
        self.lstm = nn.LSTM(N, N, 2, batch_first=True, bidirectional=True)
        self.gru, self.cell = nn.GRU(N, N, batch_first=True), nn.LSTMCell(N, N)


def no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.b(net.a(x))
    return net.c(y)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu_()
    net.b(y)[0].mul_(2)
    z = net.c(y)
    z[0].mul_(2)
    return z


def truncated(net: Any, x: Tensor) -> Tensor:
    """Backpropagation through the last two steps alone."""
    state = None
    for i, step in enumerate(x.unbind(1)):
        h, c = net.cell(step, state)
        state = (h.detach(), c.detach()) if i < 3 else (h, c)
    return state[1]


def recomputed(reentrant: bool) -> Run:
    def run(net: Any, x: Tensor) -> Tensor:
        inner = nn.Sequential(net.a, nn.Tanh(), net.b, nn.Tanh())
        y = checkpoint(inner, x, use_reentrant=reentrant)
        return net.c(checkpoint(inner, y, use_reentrant=reentrant)) + y.detach()

    return run


def dropped(reentrant: bool) -> Run:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.c(checkpoint(nn.Sequential(net.a, net.b), x, use_reentrant=reentrant).detach())

    return run


def kept(net: Any, x: Tensor) -> Tensor:
    net.last = net.b(x)
    return net.a(x)


LINEAR: dict[str, Run] = {
    "linear probe": lambda net, x: net.b(net.a(x).detach()),
    "stop-gradient branch": lambda net, x: net.b(net.a(x)) * net.a(x.flip(0)).detach(),
    "twice, once detached": lambda net, x: net.a(net.a(x).detach()),
    "output, not input": lambda net, x: net.b(net.a(x.detach()).detach().relu()),
    "unused": lambda net, x: (net.b(x), net.a(x))[1],
    "straight-through": lambda net, x: (y := net.a(x)) + (net.b(y) - y).detach(),
    "partly used": lambda net, x: net.a(x)[..., :4] + net.b(x).chunk(4, -1)[0],
    "one of a split": lambda net, x: net.c(net.a(x).split(8, -1)[0].repeat(1, 1, 2)),
    "no_grad": no_grad,
    "nothing": lambda net, x: net.b(net.a(x)).detach(),
    "frozen": lambda net, x: net.frozen(net.a(x)) + net.frozen(net.b(x)).detach(),
    "frozen first": lambda net, x: net.a(net.frozen(x.detach())),
    "in place": in_place,
    "kept": kept,
    "tied": lambda net, x: net.tied(net.a(x).detach()) + net.a(net.tied(x)).detach(),
    "recomputed": recomputed(False),
    "recomputed, reentrant": recomputed(True),
    "dropped": dropped(False),
    "dropped, reentrant": dropped(True),
}
OTHER: dict[str, Run] = {
    "convolutions": lambda net, x: net.conv(x.mT) + net.wide(x.mT)[..., :-2].detach(),
    "lookup": lambda net, x: net.a(net.table(x.argsort(-1)).detach()) + net.table(x.argsort(1)),
    "attention": lambda net, x: net.mha(x, x, x)[0],
    "attention, detached": lambda net, x: net.a(net.mha(x, x, x)[0].detach()),
    "its weights": lambda net, x: net.mha(x, x, x)[1],
    "its weights, each": lambda net, x: net.mha(x, x, x, average_attn_weights=False)[1],
    "weights of three inputs": lambda net, x: net.mha(x, net.a(x), net.b(x))[1],
    "outputs of three inputs": lambda net, x: net.mha(x, net.a(x), net.b(x))[0],
    "weights of two inputs": lambda net, x: net.mha(x, y := net.a(x), y)[1],
    "block": lambda net, x: net.a(net.block(x).detach()) + net.block(net.a(x)),
    "outputs of an LSTM": lambda net, x: net.lstm(x)[0][:, 0, :4],
    "hidden state": lambda net, x: net.lstm(x)[1][0][0],
    "cell state": lambda net, x: net.lstm(x)[1][1][-1],
    "LSTM, detached": lambda net, x: net.a(net.lstm(x)[0].detach()[..., :N]) + net.gru(x)[0],
    "GRU, detached": lambda net, x: net.a(net.gru(x)[0].detach()) + net.gru(x)[1][0, :, None],
    "truncated": truncated,
}


def built(name: str) -> Net:
    torch.manual_seed(0)
    return Net(LINEAR[name]) if name in LINEAR else Layers(OTHER[name])


def batch() -> Tensor:
    return torch.randn(2, 5, N, generator=torch.Generator().manual_seed(0))


def check(model: nn.Module, x: Any, form: Form, loss: Loss | None = None) -> ModelUse:
    """The plan and the way back cost what is counted."""
    ranked, use = copy.deepcopy(model), trace(model, x, loss)
    plan = {path: form for path, one in use.layers.items() if min(one.shape[:2]) >= 4}
    dr.apply_plan(ranked, plan)
    full = count_flops(model, x, loss)
    assert use.flops({}) == full
    assert use.flops(plan) == count_flops(ranked, x, loss)
    assert 0 <= use.rest.forward <= use.rest.training
    assert trace(ranked, x, loss).flops(dict.fromkeys(plan, FullRank())) == full
    return use


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@over({"name": [*LINEAR, *OTHER], "grad": [False, True], "form": FORMS})
def test_what_no_gradient_reaches_costs_no_backward_pass(name: str, grad: bool, form: Form) -> None:
    check(built(name), batch().requires_grad_(grad), form)


LOSSES: list[Loss] = [
    lambda out: out[0].sum(),
    lambda out: out[1].square().sum() + out[0].detach().sum(),
    lambda out: out[0][..., :2].sum() * 0,
    lambda out: out[0].detach().sum() + out[1].detach().sum(),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_output_that_the_loss_does_not_use(form: Form, loss: Loss) -> None:
    check(Net(lambda net, x: (net.b(y := net.a(x)), net.c(y))), batch(), form, loss)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_output_that_a_hook_detaches(form: Form) -> None:
    net = Net(lambda net, x: net.b(net.a(x)))
    net.a.register_forward_hook(lambda module, args, output: output.detach())
    check(net, batch(), form)


class Pooled(nn.Module):
    """BERT has a pooler, whose output is not used here."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=128,
        )  # fmt: skip
        self.bert, self.head = transformers.BertModel(config), nn.Linear(64, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.bert(input_ids).last_hidden_state[:, 0])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_pooler_of_bert(form: Form) -> None:
    use = check(Pooled(), {"input_ids": torch.arange(16).view(2, 8)}, form)
    assert [call.reached for call in use.layers["bert.pooler.dense"].calls] == [False]


@pytest.mark.parametrize("name", ["stop-gradient branch", "in place", "hidden state", "block"])
def test_meta_and_real_tensors_tell_the_same(name: str) -> None:
    net = built(name)
    on_meta, run = trace(net, batch()), net.run
    net.run = lambda own, x: (x.sum().item(), run(own, x))[1]  # a value, which meta tensors lack
    assert trace(net, batch()) == on_meta


def test_outputs_that_the_model_keeps_have_their_hooks_back() -> None:
    net = built("kept")
    count_flops(net, batch())  # a model that keeps an output cannot be copied
    trace(net, batch())
    assert net.last is not None and not net.last._base._backward_hooks


class Branches(nn.Module):
    """Self-supervised, with a stop-gradient branch, as in BYOL and SimSiam."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        target = self.inner(x.flip(0)).detach()
        return -F.cosine_similarity(self.last(self.inner(x)), target).mean()


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_plan_within_a_budget_costs_it(share: float) -> None:
    model, x = Branches(), torch.randn(8, 64)
    full = count_flops(model, x).training
    plan = dr.plan_within(model, x, flops=share)
    predicted = trace(model, x).flops(plan)
    dr.apply_plan(model, plan)
    assert predicted == count_flops(model, x)
    assert 0.9 * share < predicted.training / full <= share


def test_an_estimate_is_what_is_counted_in_each_phase() -> None:
    schedule = dynamic_rank(8, inflate=0.3, deflate=0.6, to="low-rank")
    said = dr.estimate(Branches(), torch.randn(8, 64), schedule=schedule, total_steps=10)
    assert len(said.phases) == 3 and not any(phase.extra_flops for phase in said.phases)


def test_a_run_costs_its_budget_as_counted() -> None:
    model, x, steps = Branches(), torch.randn(8, 64), 100
    full, spent = count_flops(model, x).training, 0
    optimizer, schedule = torch.optim.SGD(model.parameters(), lr=1e-3), dynamic_rank(budget=0.5)
    ranks = dr.RankScheduler(model, optimizer, schedule, steps, batches=lambda: [x])
    for _ in range(steps):
        spent += count_flops(model, x).training
        model(x).backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    assert spent / full / steps == pytest.approx(0.5, rel=0.01)


def force(second: bool) -> Run:
    """An output that is a gradient."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        (gradient,) = torch.autograd.grad(net.b(y).tanh().sum(), y, create_graph=second)
        return net.c(gradient)

    return run


class NoneBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


def penalized(output: tuple[Tensor, Tensor]) -> Tensor:
    """A loss with a gradient penalty."""
    x, y = output
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.sum() + gradient.square().sum()


INEXACT: list[tuple[nn.Module, Loss | None]] = [
    (Net(force(second=False)), None),
    (Net(force(second=True)), None),
    (Net(lambda net, x: net.a(x) + NoneBack.apply(net.b(x))), None),
    (Net(lambda net, x: (y := net.a(x), net.b(y.tanh()))), penalized),
]


@pytest.mark.parametrize(("model", "loss"), INEXACT)
def test_what_is_not_known_is_said(model: nn.Module, loss: Loss | None) -> None:
    with pytest.warns(UserWarning, match="in other forms are an estimate.*count_flops"):
        use = trace(model, batch(), loss)
    assert use.flops({}) == count_flops(model, batch(), loss)


def test_calls_that_are_not_what_runs_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Call((1000, N), Geometry(), input_grad=True, trains=True)
    monkeypatch.setattr(RankedLinear, "calls", lambda *args: {"weight": [wrong]})
    with pytest.warns(UserWarning, match=r"FLOPs of Linear .* the `calls` of a layer"):
        trace(nn.Linear(N, N), batch())
