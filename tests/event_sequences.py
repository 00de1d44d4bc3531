"""Random small models, and random sequences of what happens to them in training."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from laws import TOLERANCE, check_moments
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel

import dynarank as dr
from dynarank.checkpoint.snapshot import restore, take
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import own_parameters
from dynarank.surgery.sites import survey

WIDTH = 8


class Across(nn.Module):
    """A convolution along the length of (batch, length, width)."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.conv = kind(WIDTH, WIDTH, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class First(nn.Module):
    """A layer that returns several values, of which the first counts."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.times)[0]


class Words(nn.Module):
    """An embedding of word numbers computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x.sum(-1).abs() * 100).long() % 12)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    lambda: Across(nn.Conv1d),
    lambda: Across(nn.Conv1d, groups=2),
    lambda: Across(nn.ConvTranspose1d),
    lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True), 1),
    lambda: First(nn.LSTM(WIDTH, WIDTH, batch_first=True), 1),
    lambda: First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3),
    Words,
]
OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=1e-4),
    lambda groups: torch.optim.SGD(groups, lr=1e-2),
    lambda groups: torch.optim.Adam(groups, lr=1e-3, weight_decay=1e-4),
    lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
    lambda groups: torch.optim.RAdam(groups, lr=1e-3),
]
LR_SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, 1000),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
]


class Run:
    """A model in training. Each event is a method; all laws are asserted within or after it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        made = [self.random.choice(LAYERS)() for _ in range(self.random.randint(2, 4))]
        between = [self.random.choice([nn.ReLU(), nn.Dropout(0.2), nn.Tanh()]) for _ in made]
        flat = [one for pair in zip(made, between, strict=True) for one in pair]
        self.model = nn.Sequential(*flat, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.x = torch.randn(3, 4, WIDTH)
        self.kinds = self.random.choice(OPTIMIZERS), self.random.choice(LR_SCHEDULERS)
        if self.random.random() < 0.5:
            self.move()
        self.make_optimizer()
        self.log: list[str] = [f"seed {seed}"]

    def make_optimizer(self) -> None:
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = self.kinds[0]([{"params": matrices}, {"params": others}])
        self.lr = self.kinds[1](self.optimizer)

    def event(self) -> None:
        """One event, and the invariants after it."""
        events = [
            self.change, self.change, self.change, self.verb, self.train, self.train, self.resume,
            self.load, self.freeze, self.unfreeze, self.tie, self.untie, self.regroup, self.move,
            self.copied,
        ]  # fmt: skip
        event = self.random.choice(events)
        self.log.append(event.__name__)
        self.optimizer.zero_grad()
        event()
        self.optimizer.zero_grad()
        average = AveragedModel(self.model) if self.random.random() < 0.3 else None
        dr.check(self.model, self.optimizer, lr_scheduler=self.lr, ema=average)

    def output(self) -> Tensor:
        mode = self.model.training
        self.model.eval()
        with torch.no_grad():
            y = self.model(self.x)
        self.model.train(mode)
        return y

    def train(self) -> None:
        """Steps, in which nothing that is frozen changes."""
        frozen = {n: p.detach().clone() for n, p in self.model.named_parameters()
                  if not p.requires_grad}  # fmt: skip
        for _ in range(self.random.randint(1, 3)):
            self.optimizer.zero_grad()
            loss = self.model(self.x).square().mean()
            if loss.requires_grad:
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.lr.step()
        named = dict(self.model.named_parameters())
        assert all(torch.equal(named[n], p) for n, p in frozen.items())

    def plan(self) -> dict[str, Form]:
        sites = [site for site in survey(self.model) if site.form is not None]
        chosen = self.random.sample(sites, self.random.randint(1, min(3, len(sites))))
        return {site.path: self.form(site) for site in chosen}

    def form(self, site: Any) -> Form:
        pick = self.random.choice
        name = pick(["svd", "svd", "tucker", "cp", "separable"])
        made: Form = pick(
            [
                FullRank(),
                LowRank(1, name, execution=pick(["auto", "joined"])),
                Adapted(1, name, alpha=pick([1.0, 16.0]), restart=pick([0, 1, 2])),
            ]
        )
        if isinstance(made, FullRank):
            return made
        limit = site.spec.decomposition(made).limit(site.shape)
        return replace(made, rank=self.random.randint(1, max(1, min(4, limit))))

    def change(self) -> None:
        """Laws 3 to 6 of a random plan."""
        moments = self.random.choice(["project", "project", "reset", "prune"])
        plan, before = self.plan(), self.output()
        known = {n: (id(p), p.requires_grad) for n, p in self.model.named_parameters()}
        old = [weakref.ref(p) for p in self.model.parameters()]
        changes = self._apply(lambda: dr.apply_plan(self.model, plan, optimizer=self.optimizer,
                                                    moments=moments))  # fmt: skip
        if not any(isinstance(one.after, LowRank) for one in changes):
            close(self.output(), before)
        assert all(dr.current_plan(self.model)[path] == form for path, form in plan.items())
        prefixes = tuple(path for path, site in self.places() if site.path in plan)
        for name, p in self.model.named_parameters():
            if not name.startswith(prefixes):
                assert known[name] == (id(p), p.requires_grad)
        assert dr.apply_plan(self.model, plan, optimizer=self.optimizer) == []
        self._dead(old)

    def places(self) -> Iterator[tuple[str, Any]]:
        """Every path of each weight's modules, those of tied ones too."""
        for site in survey(self.model):
            for place in site.places:
                yield from ((path, site) for path in place.module_paths)

    def verb(self) -> None:
        """Law 3 of inflate, deflate and merge."""
        before = self.output()
        ranked = any(site.last_factored_form for site in survey(self.model))
        verbs: list[Callable[[], object]] = [
            lambda: dr.deflate(self.model, 1, layers="*", optimizer=self.optimizer),
            lambda: dr.merge(self.model, optimizer=self.optimizer),
            *([lambda: dr.inflate(self.model, optimizer=self.optimizer)] if ranked else []),
        ]
        self._apply(self.random.choice(verbs))
        close(self.output(), before)

    def _apply(self, change: Callable[[], Any]) -> Any:
        """Law 5: groups keep their number and options; law 6: v >= m^2 of what is new."""
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.groups()]
        known = [weakref.ref(p) for p in self.model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of what rounding takes
            changes = change()
        assert options == [{k: v for k, v in g.items() if k != "params"} for g in self.groups()]
        old = {id(one()) for one in known}
        made = [p for p in self.model.parameters() if id(p) not in old]
        if not isinstance(self.optimizer, torch.optim.SGD):
            check_moments(made, self.optimizer)
        return changes

    def _dead(self, old: list[Any]) -> None:
        alive = {id(p) for p in self.model.parameters()}
        if any(one() is not None and id(one()) not in alive for one in old):
            gc.collect()
        assert all(one() is None or id(one()) in alive for one in old)

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def resume(self) -> None:
        """A state that is restored after other events goes on bit by bit as it did."""
        contents = take(model=self.model, optimizer=self.optimizer, lr_scheduler=self.lr)
        moves, follows = self.random.getstate(), self.random.random() < 0.7
        self.train()
        expected = self.model.state_dict()
        expected = {name: value.clone() for name, value in expected.items()}
        if follows:
            self.change()
        restore(contents, model=self.model, optimizer=self.optimizer, lr_scheduler=self.lr)
        self.random.setstate(moves)
        self.random.random()
        self.train()
        found = self.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def load(self) -> None:
        """Loading its own states changes nothing."""
        before = self.output()
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        assert torch.equal(before, self.output())

    def freeze(self) -> None:
        module = self.random.choice([m for m in self.model.modules() if own_parameters(m)])
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)

    def unfreeze(self) -> None:
        """All but the bases; they return to a group that has lost them."""
        bases = {id(p) for n, p in self.model.named_parameters() if n.endswith("base")}
        held = {id(p) for g in self.groups() for p in g["params"]}
        for p in self.model.parameters():
            if id(p) not in bases:
                p.requires_grad_(True)
                if id(p) not in held:
                    self.groups()[0]["params"].append(p)

    def linears(self) -> list[nn.Linear]:
        return [m for m in self.model.modules() if type(m) is nn.Linear]

    def tie(self) -> None:
        if len(free := self.linears()) > 1:
            one, two = self.random.sample(free, 2)
            old, two.weight = two.weight, one.weight
            self._forget(old)

    def untie(self) -> None:
        if free := self.linears():
            layer = self.random.choice(free)
            if (
                sum(
                    p is layer.weight
                    for m in self.model.modules()
                    for p in [getattr(m, "weight", 0)]
                )
                > 1
            ):
                layer.weight = Parameter(layer.weight.detach().clone())
                self.groups()[0]["params"].append(layer.weight)

    def _forget(self, old: Parameter) -> None:
        if any(p is old for p in self.model.parameters()):
            return
        self.optimizer.state.pop(old, None)
        for group in self.groups():
            group["params"][:] = [p for p in group["params"] if p is not old]

    def regroup(self) -> None:
        """A parameter moves to the other group, a rate changes."""
        one, two = self.random.sample(self.groups(), 2)
        if len(one["params"]) > 1:
            two["params"].append(one["params"].pop(self.random.randrange(len(one["params"]))))
        one["weight_decay"] = self.random.choice([0.0, 1e-3])

    def move(self) -> None:
        """The model and the optimizer's states move to another dtype."""
        dtype = self.random.choice([torch.float32, torch.float64])
        self.model.to(dtype)
        self.x = self.x.to(dtype)
        if hasattr(self, "optimizer"):
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def copied(self) -> None:
        """Training goes on with a copy, and a new optimizer of it."""
        before, other = self.output(), copy.deepcopy(self.model)
        place = {id(p): q for p, q in zip(self.model.parameters(), other.parameters(), strict=True)}
        groups = [{**g, "params": [place[id(p)] for p in g["params"]]} for g in self.groups()]
        optimizer = self.kinds[0](groups)
        lr = self.kinds[1](optimizer)
        optimizer.load_state_dict(self.optimizer.state_dict())
        lr.load_state_dict(self.lr.state_dict())
        self.model, self.optimizer, self.lr = other, optimizer, lr
        assert torch.equal(before, self.output())


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding: a sequence may have made factors badly conditioned, so 10 times."""
    difference = (actual.double() - expected.double()).norm()
    assert difference <= 10 * TOLERANCE[expected.dtype] * expected.double().norm().clamp(min=1e-3)


def run_sequence(seed: int, events: int = 10) -> Run:
    """A random model through that many random events."""
    run = Run(seed)
    try:
        for _ in range(events):
            run.event()
    except Exception as error:
        error.add_note(", ".join(run.log))
        raise
    return run
