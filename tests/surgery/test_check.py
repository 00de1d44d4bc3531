"""dr.check names each broken invariant, and raises no false alarm."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, Architecture
from every_layer import FORMS, KINDS, Kind
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel

import dynarank as dr
from dynarank.surgery.check import InvariantError
from dynarank.surgery.structure import structure_hash


class Net(nn.Module):
    """Two layers of one weight, one of its own, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.two(self.one(x)))))


class State(SimpleNamespace):
    """What ``dr.check`` takes, of a run that has taken a step."""

    def check(self) -> None:
        dr.check(self.model, self.optimizer, lr_scheduler=self.lr, ema=self.ema, ranks=self.ranks)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().mean().backward()
        self.optimizer.step()


def state(form: str = "low-rank") -> State:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    FORMS[form](model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    lr = lrs.OneCycleLR(optimizer, 0.1, 10)
    made = State(model=model, optimizer=optimizer, lr=lr, ema=AveragedModel(model), ranks=None)
    made.step()
    made.optimizer.zero_grad()
    made.check()
    return made


def in_no_group(s: State) -> None:
    group = s.optimizer.param_groups[0]["params"]
    del s.optimizer.state[group[0]], group[0]


def in_two_groups(s: State) -> None:
    s.optimizer.param_groups.append(dict(s.optimizer.param_groups[0]))
    s.optimizer.param_groups[1]["params"] = [s.model.norm.weight]
    s.lr = None


def foreign_parameter(s: State) -> None:
    s.optimizer.param_groups[0]["params"].append(Parameter(torch.zeros(3)))


def orphaned_state(s: State) -> None:
    s.optimizer.state[Parameter(torch.zeros(3))] = {"step": torch.tensor(1.0)}


def state_of_other(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def damage(s: State) -> None:
        entries = s.optimizer.state[s.model.last.up]
        entries["exp_avg"] = change(entries["exp_avg"])

    return damage


def other_optimizer(s: State) -> None:
    s.optimizer = torch.optim.AdamW((p for p in s.model.parameters() if p.requires_grad), lr=1e-3)


def new_group(s: State) -> None:
    bias = s.optimizer.param_groups[0]["params"].pop()
    s.optimizer.add_param_group({"params": [bias]})


def other_alpha(s: State) -> None:
    layer = s.ema.module.last
    layer.set_form("weight", dr.Adapted(2, alpha=1.0))


def average_of_another_form(s: State) -> None:
    dr.inflate(s.ema.module, layers="last")


def dictionary_without_a_name(s: State) -> None:
    s.ema = {n: p.clone() for n, p in s.model.state_dict().items() if n != "last.bias"}


def half_tied(s: State) -> None:
    s.model.two.up = Parameter(s.model.two.up.detach().clone())
    s.optimizer.param_groups[0]["params"].append(s.model.two.up)
    s.ema = None


def tied_in_memory_only(s: State) -> None:
    s.model.two.bias = Parameter(s.model.one.bias.data)
    s.optimizer.param_groups[0]["params"] = [*s.model.parameters()]
    s.optimizer.state.clear()


def as_declared(s: State) -> None:
    s.model.config = SimpleNamespace(tie_word_embeddings=True)
    s.model.get_input_embeddings = lambda: s.model.one
    s.model.get_output_embeddings = lambda: s.model.two
    s.check()
    s.model.get_output_embeddings = lambda: s.model.last


def trains_the_base(s: State) -> None:
    s.model.last.base.requires_grad_()
    s.optimizer.param_groups[0]["params"].append(s.model.last.base)


def factor_of_another_rank(s: State) -> None:
    for layer in (s.model.last, s.ema.module.last):
        layer.up.data = torch.zeros(8, 3)
    s.optimizer.state.clear()


def weight_beside_factors(s: State) -> None:
    s.model.last._parameters["weight"] = Parameter(torch.zeros(8, 8))
    s.optimizer.param_groups[0]["params"].append(s.model.last._parameters["weight"])
    s.ema = None


def stale_form(s: State) -> None:
    s.model.last._forms = {"weight": dr.LowRank(1)}
    s.ema = None


def kept_by_a_list(s: State) -> None:
    s.kept = [s.model.last.up]
    dr.inflate(s.model, layers="last", optimizer=s.optimizer)
    s.ema = None


def not_finite(where: str) -> Callable[[State], None]:
    def damage(s: State) -> None:
        last = s.model.last
        if where == "gradient":
            last.bias.grad = torch.full((8,), torch.nan)
        elif where == "state":
            s.optimizer.state[last.bias]["exp_avg"][0] = torch.inf
        else:
            (last.bias if where == "weight" else s.model.norm.running_var).data[0] = torch.inf

    return damage


def compiled_inside(s: State) -> None:
    s.model.last = torch.compile(s.model.last, backend="eager")
    s.ema = None


def prefixed_average(s: State) -> None:
    s.ema = {f"module.{name}": v for name, v in s.model.state_dict().items()}


BROKEN: list[tuple[str, str, str, Callable[[State], None]]] = [
    ("I1", "low-rank", "it trains, and is in none", in_no_group),
    ("I1", "low-rank", "norm.weight: it is in 2 groups", in_two_groups),
    ("I2", "low-rank", r"shape \(3,\): it is in a group .* not the model's", foreign_parameter),
    ("I2", "low-rank", r"shape \(3,\): it is in the state", orphaned_state),
    ("I3", "low-rank", r"last.up: its state exp_avg has the shape \(2, 8\), it has \(8, 2\)",
     state_of_other(lambda v: v.T.contiguous())),
    ("I3", "low-rank", "last.up: its state exp_avg is torch.float64",
     state_of_other(lambda v: v.double())),
    ("I3", "low-rank", "exp_avg is torch.float32 on meta", state_of_other(lambda v: v.to("meta"))),
    ("I4", "low-rank", "OneCycleLR: it drives another AdamW", other_optimizer),
    ("I4", "low-rank", "OneCycleLR: it has 1 base_lrs, its optimizer 2 groups", new_group),
    ("I5", "low-rank", "it does not have 'last.down', 'last.up'", average_of_another_form),
    ("I5", "adapted", "last: it is .*alpha=1.0.* in the average", other_alpha),
    ("I5", "low-rank", "it does not have 'last.bias'", dictionary_without_a_name),
    ("I6", "low-rank", "two: it shares a parameter with 'one'", half_tied),
    ("I6", "low-rank", "two.bias: it is in the memory of 'one.bias'", tied_in_memory_only),
    ("I6", "low-rank", "the output embeddings", as_declared),
    ("I7", "adapted", "last: its base is frozen", trains_the_base),
    ("I7", "low-rank", r"its up is \(8, 2\), and it has \(8, 3\)", factor_of_another_rank),
    ("I7", "low-rank", "a parameter 'weight' beside its factors", weight_beside_factors),
    ("I7", "low-rank", r"records the form LowRank\(rank=1", stale_form),
    ("I9", "low-rank", r"last: its parameter of shape \(8, 2\) was replaced .* a list of 1",
     kept_by_a_list),
    *[("I10", "low-rank", f"last.bias: {said}", not_finite(where)) for where, said in (
        ("weight", "it holds NaN"), ("gradient", "its gradient"), ("state", "its state exp_avg"))],
    ("I10", "low-rank", "norm.running_var: this buffer", not_finite("buffer")),
    ("I11", "low-rank", "last: OptimizedModule puts _orig_mod. into the keys", compiled_inside),
    ("I11", "low-rank", "ema: its keys begin with module.", prefixed_average),
]  # fmt: skip


@pytest.mark.parametrize(
    "invariant, form, words, damage", BROKEN, ids=[f"{n}-{w[:20]}" for n, _, w, _ in BROKEN]
)
def test_what_is_broken_is_named_and_nothing_else(
    invariant: str, form: str, words: str, damage: Callable[[State], None]
) -> None:
    s = state(form)
    damage(s)
    with pytest.raises(InvariantError, match=words) as caught:
        s.check()
    assert {one.invariant for one in caught.value.problems} == {invariant}
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@contextmanager
def one_process() -> Generator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("damage", ["replaced", "unfrozen", "none"])
def test_ddp_knows_what_trains(damage: str) -> None:
    with one_process():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].bias.requires_grad_(False)
        wrapped = DistributedDataParallel(model)
        dr.check(wrapped, torch.optim.SGD(model.parameters()))
        if damage == "replaced":
            model[0].weight = nn.Parameter(torch.zeros(8, 8))
        elif damage == "unfrozen":
            model[0].bias.requires_grad_()
        if damage != "none":
            with pytest.raises(InvariantError, match=r"I8 .*wrap the model again") as caught:
                dr.check(wrapped)
            invariants = [one.invariant for one in caught.value.problems]
            assert invariants == ["I8"]
            del wrapped, caught
            dr.check(DistributedDataParallel(model))


def test_fsdp_owns_what_trains() -> None:
    with one_process():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        dr.check(model, torch.optim.SGD(model.parameters()))
        model[1] = nn.Linear(8, 8)
        with pytest.raises(InvariantError, match=r"I8 .*does not know .*'1.bias', '1.weight'"):
            dr.check(model)


def test_the_rank_scheduler_is_of_this_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = dr.schedules.dynamic_rank(2, inflate=2, deflate=6)
    ranks = dr.RankScheduler(model, optimizer, schedule, 8, layers="*")
    for _ in range(8):
        dr.check(model, optimizer, ranks=ranks)
        optimizer.step()
        ranks.step()
    dr.check(model, optimizer, ranks=ranks)
    with pytest.raises(InvariantError, match="I7 ranks: it changes another SGD"):
        dr.check(model, torch.optim.SGD([*model.parameters()]), ranks=ranks)
    with pytest.raises(InvariantError, match="I7 ranks: it changes another model"):
        dr.check(copy.deepcopy(model), ranks=ranks)
    dr.inflate(model, layers="0", optimizer=optimizer)
    with pytest.raises(InvariantError, match="I7 0: its rank scheduler gave it Adapted"):
        dr.check(model, optimizer, ranks=ranks)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_false_alarm_on_any_layer(kind: Kind) -> None:
    model = kind.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    changes: list[Callable[[], object]] = [
        lambda: dr.factorize(model, 2, layers="*", optimizer=optimizer),
        lambda: dr.inflate(model, optimizer=optimizer),
        lambda: dr.deflate(model, 2, layers="*", optimizer=optimizer),
        lambda: dr.merge(model, optimizer=optimizer),
    ]
    for change in changes:
        optimizer.zero_grad()
        model(*kind.inputs()).square().mean().backward()
        optimizer.step()
        change()
        dr.check(model, optimizer, ema=AveragedModel(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_no_false_alarm_on_any_architecture(architecture: Architecture) -> None:
    model = architecture.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dr.check(model, optimizer)
    for change in (lambda: dr.factorize(model, 0.5, optimizer=optimizer),
                   lambda: dr.deflate(model, 2, optimizer=optimizer)):  # fmt: skip
        optimizer.zero_grad()
        architecture.loss(model, architecture.batch()).backward()
        optimizer.step()
        change()
        dr.check(model, optimizer, ema=copy.deepcopy(model))


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        *(getattr(torch.optim, name) for name in (
            "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
            "Adafactor")),
    ],
)  # fmt: skip
def test_no_false_alarm_for_any_optimizer(make: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = make(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        dr.check(model, optimizer)
    dr.factorize(model, 2, layers="*", optimizer=optimizer, moments="reset")
    dr.check(model, optimizer)


def test_no_false_alarm_for_lbfgs_wrappers_groups_and_several_optimizers() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    dr.factorize(model, 2, layers="*")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(loss)
    dr.check(model, optimizer)
    ups = [model[0].up, model[1].up]
    others = [p for p in model.parameters() if not any(p is up for up in ups)]
    plus = torch.optim.AdamW([{"params": others}, {"params": ups, "lr": 0.1}])
    dr.check(model, plus)
    two = [torch.optim.SGD(ups), torch.optim.Adam(others)]
    dr.check(model, two)
    with pytest.raises(InvariantError, match="I1"):
        dr.check(model, two[0])
    wrapper = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper.base_optimizer = torch.optim.Adam(wrapper.param_groups)  # type: ignore[attr-defined]
    dr.check(model, wrapper)


def test_frozen_layers_masks_and_wrappers_are_no_faults() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # the frozen ones too
    dr.check(model, optimizer)
    dr.deflate(model, 2, layers="*", optimizer=optimizer)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        dr.check(wrapped, optimizer, ema={n: p.clone() for n, p in model.state_dict().items()})


LR_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2]),
    "ConstantLR": lrs.ConstantLR,
    "LinearLR": lrs.LinearLR,
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lrs.PolynomialLR,
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 9),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 9),
    "ReduceLROnPlateau": lrs.ReduceLROnPlateau,
    "SWALR": lambda o: SWALR(o, 0.1),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 2), lrs.ConstantLR(o)]),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.StepLR(o, 2), lrs.LinearLR(o)], [3]),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_lr_scheduler(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    scheduler = LR_SCHEDULERS[name](optimizer)
    dr.check(model[0], optimizer, lr_scheduler=scheduler)
    dr.factorize(model[0], 2, optimizer=optimizer)
    dr.check(model[0], optimizer, lr_scheduler=[scheduler, [0.1, 0.1]])
    other = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(InvariantError, match=r"I4 \w+: it drives another SGD"):
        dr.check(model[0], other, lr_scheduler=scheduler)
    optimizer.add_param_group({"params": [*model[1].parameters()]})
    with pytest.raises(InvariantError, match="I4") as caught:
        dr.check(model, optimizer, lr_scheduler=scheduler)
    assert {one.invariant for one in caught.value.problems} == {"I4"}


def test_every_lr_scheduler_of_torch_has_a_row() -> None:
    known = {name for name, cls in vars(lrs).items() if isinstance(cls, type)
             and issubclass(cls, lrs.LRScheduler) and not name.startswith("_")}  # fmt: skip
    assert known - {"LRScheduler"} == {*LR_SCHEDULERS} - {"SWALR"}


def test_other_kinds_of_averages() -> None:
    s = state()
    every = [p.detach().clone() for p in s.model.parameters()]
    for ema in (SimpleNamespace(shadow_params=every), SimpleNamespace(module=s.ema.module)):
        dr.check(s.model, ema=ema)
    with pytest.raises(InvariantError, match="I5"):
        dr.check(s.model, ema=SimpleNamespace(shadow_params=every[1:]))
    with pytest.raises(TypeError, match="ema is a copy of the model"):
        dr.check(s.model, ema=3)


def test_nothing_is_changed() -> None:
    s = state()
    before, random_state = copy.deepcopy(s.optimizer.state_dict()), torch.get_rng_state()
    known = {name: (id(p), p._version) for name, p in s.model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.check()
    assert known == {name: (id(p), p._version) for name, p in s.model.named_parameters()}
    assert str(before) == str(s.optimizer.state_dict())
    assert torch.equal(random_state, torch.get_rng_state()) and s.model.training


def test_the_structure_hash_tells_structures_apart() -> None:
    made: list[Callable[[nn.Module], object]] = [
        lambda m: None,
        lambda m: m.double(),
        lambda m: m.one.bias.requires_grad_(False),
        lambda m: setattr(m.two, "weight", Parameter(torch.zeros(8, 8))),
        *FORMS.values(),
        lambda m: dr.factorize(m, 1, layers="*"),
        lambda m: dr.deflate(m, 2, layers="*", alpha=1.0),
    ]
    hashes: list[str] = []
    for change in made:
        model = Net()
        change(model)
        hashes.append(structure_hash(model))
        with torch.no_grad():
            model.last.bias.add_(1)
        assert structure_hash(copy.deepcopy(model)) == hashes[-1]
    assert len({*hashes}) == len(hashes)
