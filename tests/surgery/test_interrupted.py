"""Ctrl-C at any line of a change: model and optimizer are wholly as before, or wholly as after."""

from __future__ import annotations

import contextlib
import copy
import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from faults import some
from stepping import one_step
from torch import Tensor, nn

import dynarank as dr
from dynarank.layers import RankedLayer

SOURCE = Path(dr.__file__).parent
WRITERS = {
    str(SOURCE / file)
    for file in (
        "surgery/edit.py", "surgery/verbs.py", "surgery/transaction.py", "surgery/committed.py",
        "surgery/optimizer_state.py", "surgery/restore.py",
        "scheduler/rank_scheduler.py", "scheduler/postponed.py",
        "layers/ranked.py", "layers/recurrent/modules.py", "monitors/calibration.py",
    )
}  # fmt: skip
STACK = ("callback", "_push_exit_callback", "pop_all")  # of an ExitStack


class Mixed(nn.Module):
    """A convolution, a recurrent layer, attention that reads its child's weight, a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)
        self.recurrent = nn.GRU(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.frozen.requires_grad_(False)
        self.recurrent.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(self.norm(self.conv(x)).permute(2, 0, 1))[0]
        y = self.frozen(torch.nn.functional.dropout(y, 0.1))
        return self.two(self.one(self.attention(y, y, y)[0]))


X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
Pair = tuple[Mixed, torch.optim.Optimizer]
CHANGES: dict[str, Callable[[Mixed, torch.optim.Optimizer], object]] = {
    "factorize": lambda m, o: dr.factorize(
        m, 2, layers="*", optimizer=o, calibration=dr.calibrate(m, [X])
    ),
    "inflate": lambda m, o: dr.inflate(m, optimizer=o),
    "deflate": lambda m, o: dr.deflate(m, 1, optimizer=o),
    "merge": lambda m, o: dr.merge(m, optimizer=o),
    "step": lambda m, o: next_step(m, o),
    "load": lambda m, o: scheduler(m, o).load_state_dict(saved()),
}


def scheduler(model: nn.Module, optimizer: torch.optim.Optimizer) -> dr.RankScheduler:
    """One whose next step inflates."""
    schedule = dr.schedules.dynamic_rank(2, inflate=1, deflate=3)
    return dr.RankScheduler(model, optimizer, schedule, 4)


def next_step(model: Mixed, optimizer: torch.optim.Optimizer) -> None:
    """A step of the scheduler, after one of the optimizer that moves nothing."""
    ranks, gradient = scheduler(model, optimizer), model.norm.weight.grad
    model.norm.weight.grad = None
    optimizer.step()
    model.norm.weight.grad = gradient
    ranks.step()


@cache
def saved() -> dict[str, Any]:
    """The state of a scheduler after that step."""
    ranks = scheduler(*trained(ranked=True))
    one_step(ranks)
    return ranks.state_dict()


def trained(ranked: bool) -> Pair:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if ranked:
        dr.factorize(model, 2, layers="*", optimizer=optimizer)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def copied(start: Pair) -> Pair:
    """A copy, with a gradient that no change is to touch."""
    model, optimizer = copy.deepcopy(start)
    model.norm.weight.grad = torch.ones(4)
    return model, optimizer


def picture(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that a change may touch, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    modules = [
        (path, type(m), m.training, sorted(vars(m)),
         m.forms if isinstance(m, RankedLayer) else None,
         *(len(vars(m)[table]) for table in ("_forward_hooks", "_forward_hooks_with_kwargs")))
        for path, m in model.named_modules()
    ]  # fmt: skip
    values = [(n, p.requires_grad, p.tolist()) for n, p in model.named_parameters()]
    groups = [[names.get(id(p), "foreign") for p in g["params"]] for g in optimizer.param_groups]
    states = [
        (names.get(id(p), "foreign"), {key: value.tolist() for key, value in state.items()})
        for p, state in optimizer.state.items()
    ]
    buffers = [(name, buffer.tolist()) for name, buffer in model.named_buffers()]
    gradients = [(n, p.grad.tolist()) for n, p in model.named_parameters() if p.grad is not None]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), list(warnings.filters)
    random = torch.get_rng_state().numpy().tobytes()
    return [
        modules, values, groups, sorted(states, key=lambda s: s[0]), buffers, gradients, modes,
        random,
    ]  # fmt: skip


def identities(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


@cache
def takes_no_signal(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith(("with ", "try:"))


Line = tuple[CodeType, int]


class Lines:
    """Counts the lines that run, of files that write and of stacks.

    Not the line of a ``with`` (tracing shows it again when the block is left, before the context
    exits, where Python takes no signal) or of a ``try``, which does nothing and no handler covers,
    and not in a clean-up that has begun.
    """

    def __init__(self) -> None:
        self.seen = list[Line]()

    def wanted(self, code: CodeType) -> bool:
        file = code.co_filename
        return file in WRITERS or (file == contextlib.__file__ and code.co_name in STACK)

    def at(self, line: Line) -> None:
        self.seen.append(line)

    def __call__(self, frame: FrameType, event: str, _: object) -> Lines | None:
        code = frame.f_code
        if not self.wanted(code):
            return None
        if frame.f_back is not None and frame.f_back.f_code.co_name == "_exit_wrapper":
            return None
        if event == "line" and not takes_no_signal(code.co_filename, frame.f_lineno):
            self.at((code, frame.f_lineno))
        return self

    def run(self, change: Callable[..., object], *args: object) -> Lines:
        outer = sys.gettrace()
        sys.settrace(self)
        try:
            change(*args)
        finally:
            sys.settrace(outer)
        return self


class Interrupt(Lines):
    """Raises at the n-th time of a line; of other functions it traces nothing, which is slow."""

    def __init__(self, line: Line, n: int) -> None:
        self.line, self.left = line, n

    def wanted(self, code: CodeType) -> bool:
        return code is self.line[0]

    def at(self, line: Line) -> None:
        self.left -= line == self.line
        if self.left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt


def prepared(verb: str) -> tuple[Callable[..., object], Pair]:
    """A change that has imported what it needs, and what it is to change."""
    change, start = CHANGES[verb], trained(ranked=verb != "factorize")
    change(*copied(start))
    return change, start


@cache
def points(verb: str) -> list[tuple[Line, int]]:
    """The lines that a change runs, last first, with the last time; in full, the first time too."""
    change, start = prepared(verb)
    lines = Lines().run(change, *copied(start)).seen
    times, last = Counter(lines), dict[tuple[str, int], Line]()
    for code, n in reversed(lines):
        last.setdefault((code.co_filename, n), (code, n))
    first = some([], [(line, 1) for line in times])
    return [*dict.fromkeys([*((line, times[line]) for line in last.values()), *first])]


def covering(verb: str) -> list[tuple[Line, int]]:
    """Its last line, and of lines that several changes run its share, in turn; in full, all."""
    verbs = dict[Line, list[str]]()
    for other in CHANGES:
        for line, _ in points(other):
            verbs.setdefault(line, []).append(other)
    share = {line for i, (line, of) in enumerate(verbs.items()) if of[i % len(of)] == verb}
    end, *others = points(verb)
    return some([end, *(point for point in others if point[0] in share)], others)


@pytest.mark.slow
@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_interrupted_at_any_line(verb: str) -> None:
    change, start = prepared(verb)
    done = copied(start)
    change(*done)
    after, before, outcomes = picture(*done), picture(*copied(start)), Counter[str]()
    model, optimizer = copied(start)
    for line, time in covering(verb):
        held = identities(model)
        with pytest.raises(KeyboardInterrupt):
            Interrupt(line, time).run(change, model, optimizer)
        now = picture(model, optimizer)
        assert now in (before, after), f"half changed by an interrupt at {line}, time {time}"
        if now == before:
            assert identities(model) == held
        else:
            model, optimizer = copied(start)
        outcomes["before" if now == before else "after"] += 1
    assert outcomes.keys() == {"before", "after"} and model(X).shape == (4, 2, 4)
