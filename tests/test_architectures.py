"""Every architecture through every change of form while it trains, with the laws checked at each.

Covered: each architecture x {SGD in fp32, AdamW under bf16 autocast}, eager; five of them compiled,
by SGD in fp32 (``test_compile.py`` has every form, bf16 too). What a model has is asked, not
listed: modules that become rankable later are
covered without an edit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, Architecture
from hypothesis import HealthCheck, given, settings
from laws import OPTIMIZERS, any_form, assert_close, check_optimizer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.forms import Form
from dynarank.layers import RankedLayer
from dynarank.surgery.sites import Site, survey

over_architectures = pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
LR = {"sgd": 0.01, "adamw": 3e-3}
ALPHA = 2.0  # the published 16 is a scale of 2 to 4 at these ranks: too much for this rate of SGD


class Run:
    """One model in training."""

    def __init__(self, arch: Architecture, kind: str, autocast: bool = False) -> None:
        self.arch, self.autocast = arch, autocast
        self.model, self.batch = arch.build(), arch.batch()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = LR[kind]

    def train(self, steps: int) -> list[float]:
        self.model.train()
        losses: list[float] = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.arch.loss(self.model, self.batch)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def logits(self) -> Tensor:
        """In eval mode and fp32; by torch's fused inference path where there is one."""
        self.model.eval()
        with torch.no_grad():
            return self.arch.logits(self.model, self.batch)

    def skip_if_plain_fails(self) -> None:
        """Torch has no bf16 LSTM on some CPUs."""
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                self.arch.loss(self.arch.build(), self.batch)
        except RuntimeError as error:
            pytest.skip(f"the plain model does not run here: {error}")

    def keeps_function(self, change: Callable[[], object]) -> None:
        before = self.logits()
        change()
        assert_close(self.logits(), before)
        check_optimizer(self.model, self.optimizer)


def able(model: nn.Module) -> list[Site]:
    return [site for site in survey(model) if site.form is not None]


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_plain(model: nn.Module, arch: Architecture) -> None:
    """Classes and keys are those of a fresh model, which takes the weights."""
    fresh = arch.build()
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_tied(model, arch)


def assert_tied(model: nn.Module, arch: Architecture) -> None:
    """The same Parameter objects at each of the paths."""
    own = [dict(model.get_submodule(path).named_parameters(recurse=False)) for path in arch.tied]
    for other in own[1:]:
        shared = {n for n in own[0] if n != "bias"}
        assert shared and all(other[name] is own[0][name] for name in shared)


@over_architectures
@pytest.mark.parametrize(
    ("kind", "autocast"), [("sgd", False), ("adamw", True)], ids=["sgd-fp32", "adamw-bf16"]
)
def test_a_whole_run(arch: Architecture, kind: str, autocast: bool) -> None:
    run = Run(arch, kind, autocast)
    run.skip_if_plain_fails()
    dr.factorize(run.model, Rank(0.125, of="min"), optimizer=run.optimizer)
    check_optimizer(run.model, run.optimizer)
    factorized = {p for p, form in dr.current_plan(run.model).items() if form != FullRank()}
    assert factorized
    losses = run.train(20)
    assert losses[-1] < losses[0]
    run.keeps_function(lambda: dr.inflate(run.model, optimizer=run.optimizer))
    run.train(3)
    run.keeps_function(lambda: dr.deflate(run.model, alpha=ALPHA, optimizer=run.optimizer))
    adapted = {p for p, f in dr.current_plan(run.model).items() if isinstance(f, Adapted)}
    assert factorized <= adapted
    frozen = bases(run.model)
    run.train(3)
    assert frozen and all(map(torch.equal, bases(run.model).values(), frozen.values()))
    run.keeps_function(lambda: dr.inflate(run.model, optimizer=run.optimizer))
    truncate(run)
    run.train(3)
    run.keeps_function(lambda: dr.merge(run.model, optimizer=run.optimizer))
    assert_plain(run.model, arch)
    assert run.train(2)[-1] < losses[0]


def truncate(run: Run) -> None:
    """Deflate to low-rank: each weight changes by its announced error."""
    sites = {s.path: s for s in able(run.model) if isinstance(s.module, RankedLayer)}
    plan: dict[str, Form] = {
        path: LowRank(site.last_factored_form.rank)
        for path, site in sites.items()
        if site.last_factored_form is not None
    }
    before = {path: sites[path].effective().detach().double() for path in plan}
    changes = dr.apply_plan(run.model, plan, optimizer=run.optimizer)
    assert {change.path for change in changes} == set(plan)
    after = {s.path: s.effective().detach().double() for s in able(run.model)}
    for change in changes:
        old = before[change.path]
        actual = (after[change.path] - old).norm() / old.norm()
        assert change.error == pytest.approx(actual.item(), abs=1e-6)
    assert max(change.error for change in changes) > 1e-3
    check_optimizer(run.model, run.optimizer)


@over_architectures
def test_every_weight_at_once(arch: Architecture) -> None:
    """``layers="*"``: embeddings, tied weights and those that do not get cheaper too."""
    run = Run(arch, "adamw")
    everything = {site.path for site in able(run.model)}
    dr.factorize(run.model, Rank(0.5, of="min"), layers="*", optimizer=run.optimizer)
    assert all(form != FullRank() for form in dr.current_plan(run.model).values())
    assert_tied(run.model, arch)
    losses = run.train(8)
    assert losses[-1] < losses[0]
    run.keeps_function(lambda: dr.inflate(run.model, optimizer=run.optimizer))
    run.keeps_function(lambda: dr.deflate(run.model, alpha=ALPHA, optimizer=run.optimizer))
    assert_tied(run.model, arch)
    frozen = bases(run.model)
    run.train(2)
    assert all(map(torch.equal, bases(run.model).values(), frozen.values()))
    run.keeps_function(lambda: dr.merge(run.model, optimizer=run.optimizer))
    assert {site.path for site in able(run.model)} == everything
    assert_plain(run.model, arch)


def within_limit(model: nn.Module, path: str, form: Form) -> Form:
    """The form at the most this rank that the weight allows."""
    (site,) = (site for site in able(model) if site.path == path)
    return form if isinstance(form, FullRank) else replace(form, rank=min(form.rank, *site.shape))  # type: ignore[type-var]


# Compiled whole: one compilation for each change of plan, none for the second step.


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "convnext", "wide-resnet"])
def test_compiled_through_the_phases(name: str) -> None:
    run = Run(BY_NAME[name], "sgd")
    torch._dynamo.reset()
    counter = CompileCounter()
    call = torch.compile(run.model, backend=counter, fullgraph=True)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    changes = [
        lambda: dr.factorize(run.model, Rank(0.25, of="min"), optimizer=run.optimizer),
        lambda: dr.inflate(run.model, optimizer=run.optimizer),
        lambda: dr.deflate(run.model, alpha=ALPHA, optimizer=run.optimizer),
    ]
    for i, change in enumerate(changes):
        change()
        for _ in range(2):
            expected = run.arch.loss(copy.deepcopy(run.model), run.batch)
            loss = run.arch.loss(call, run.batch)
            assert_close(loss, expected)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        assert counter.frame_count == i + 1


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["sgd", "adamw"]))
def test_any_walk_of_a_bert(data: st.DataObject, kind: str) -> None:
    run = Run(BY_NAME["bert"], kind)
    paths = [site.path for site in able(run.model)]
    plans = st.dictionaries(st.sampled_from(paths), any_form, min_size=1, max_size=6)
    for drawn in data.draw(st.lists(plans, min_size=1, max_size=4)):
        plan = {path: within_limit(run.model, path, form) for path, form in drawn.items()}
        run.train(1)
        before = run.logits()
        changes = dr.apply_plan(run.model, plan, optimizer=run.optimizer)
        if not any(isinstance(change.after, LowRank) for change in changes):
            assert_close(run.logits(), before)
        assert dr.apply_plan(run.model, plan, optimizer=run.optimizer) == []
        check_optimizer(run.model, run.optimizer)
        assert_tied(run.model, run.arch)
    run.keeps_function(lambda: dr.merge(run.model, optimizer=run.optimizer))
    assert_plain(run.model, run.arch)


# Tied weights, as transformers ties them.


def hf_tied(model: nn.Module) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_tied_embedding_is_left_alone_by_default(name: str) -> None:
    arch = BY_NAME[name]
    model = dr.factorize(arch.build(), Rank(0.25, of="min"))
    assert dr.current_plan(model)[arch.tied[0]] == FullRank() and hf_tied(model)
    assert type(model.get_submodule(arch.tied[1])) is nn.Linear


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("by", [0, 1], ids=["embedding", "head"])
@pytest.mark.parametrize("form", [LowRank(8), Adapted(8), Adapted(8, execution="two-branch")])
def test_a_tied_weight_changes_at_both_places(
    name: str, by: int, form: Form, tmp_path: Path
) -> None:
    run = Run(BY_NAME[name], "adamw")
    path = run.arch.tied[by]
    (change,) = dr.apply_plan(run.model, {path: form}, optimizer=run.optimizer)
    assert change.after == form
    assert_tied(run.model, run.arch)
    check_optimizer(run.model, run.optimizer)
    losses = run.train(5)
    assert losses[-1] < losses[0]
    run.keeps_function(lambda: dr.inflate(run.model, layers=path, optimizer=run.optimizer))
    assert hf_tied(run.model)
    run.keeps_function(lambda: dr.deflate(run.model, layers=path, optimizer=run.optimizer))
    assert_tied(run.model, run.arch)
    run.keeps_function(lambda: dr.merge(run.model, optimizer=run.optimizer))
    assert hf_tied(run.model)
    run.model.tie_weights()  # type: ignore[operator]
    assert hf_tied(run.model)
    run.model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(run.model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert hf_tied(loaded)
    assert torch.equal(run.logits(), loaded(run.batch).logits)


@pytest.mark.parametrize("form", [LowRank(8), Adapted(8), Adapted(8, execution="two-branch")])
def test_gradients_flow_from_both_uses(form: Form) -> None:
    """The factors' gradient is that of the embedding's use plus that of the head's."""
    arch = BY_NAME["gpt2"]
    model, batch = arch.build().eval().double(), arch.batch()
    dr.apply_plan(model, {"lm_head": form})
    with torch.no_grad():
        model.lm_head.up.normal_(std=0.1)
    arch.loss(model, batch).backward()
    found = {n: p.grad for n, p in model.lm_head.named_parameters() if p.requires_grad}
    parts: list[dict[str, Tensor]] = []
    for path in arch.tied:
        apart = copy.deepcopy(model)
        own = apart.get_submodule(path)
        for name, p in list(own.named_parameters(recurse=False)):
            setattr(own, name, nn.Parameter(p.detach().clone(), p.requires_grad))
        apart.zero_grad()
        arch.loss(apart, batch).backward()
        parts.append({n: p.grad for n, p in own.named_parameters() if p.requires_grad})
    for name, grad in found.items():
        assert all(part[name].abs().sum() > 0 for part in parts)
        assert_close(grad, parts[0][name] + parts[1][name])
