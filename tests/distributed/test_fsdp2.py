"""Law 9 under FSDP2: a run of shards equals that of one process, through every change of form.

The global batch of a step is the same; each process has a share of it. The cases of one number of
processes run in one call, since each is short.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from process_pool import Pools
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import dynarank as dr
from dynarank.decompositions import UnfitWeightError
from dynarank.distributed import fsdp2
from dynarank.distributed.dtensors import local_part, whole
from dynarank.factors.balance import balance
from dynarank.surgery import sharded, transaction

STEPS, BATCH, RANK = 12, 16, 3
INFLATE, DEFLATE = 4, 8
Ending = Literal["adapted", "low-rank"]


def mlp() -> nn.Sequential:
    """Rows that no number of processes divides, and fewer rows than four processes."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 20), nn.ReLU())
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), hidden, nn.Linear(20, 3))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 9, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), first, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)


@dataclass(frozen=True)
class Case:
    """A way to shard a model."""

    options: dict[str, Any] = field(default_factory=dict[str, Any])
    units: tuple[str, ...] = ()  # beside the root
    make: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    mesh: tuple[int, ...] = ()  # (): of all processes
    within: float = 1e-5
    frozen: str = ""
    endings: tuple[Ending, ...] = ("low-rank",)


LEAVES = ("0", "2.0", "2.2", "3")
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)


def last_dimension(p: nn.Parameter) -> Shard | None:
    return Shard(p.ndim - 1) if p.shape[-1] % 2 == 0 else None


BOTH: tuple[Ending, ...] = ("adapted", "low-rank")
CASES = {
    "root": Case(endings=BOTH),
    "leaves": Case(units=LEAVES, endings=BOTH),
    "nested": Case(units=("2.0", "2"), optimizer=sgd, endings=BOTH),
    "fused": Case(units=("2",), optimizer=fused),
    "not resharded": Case({"reshard_after_forward": False}, LEAVES, endings=("adapted",)),
    "bf16": Case({"mp_policy": BF16}, LEAVES, within=0.1, endings=("adapted",)),
    "offloaded": Case({"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "columns": Case({"shard_placement_fn": last_dimension}, endings=("adapted",)),
    "convolutions": Case(units=("1",), make=convolutions),
    "frozen": Case(frozen="2.0.weight"),
    "frozen unit": Case(units=("2.0",), frozen="2.0", endings=("adapted",)),
}
CASES_OF_FOUR = {
    "root of four": Case(endings=("adapted",)),
    "a smaller mesh after forward": Case({"reshard_after_forward": 2}, LEAVES),
    "HSDP": Case(units=("2",), mesh=(2, 2)),
}


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(16, 3, generator=generator)
    xs = [torch.randn(BATCH, 16, generator=generator) for _ in range(STEPS)]
    return [(x, (x @ teacher).argmax(1)) for x in xs]


def mesh_of(case: Case) -> Any:
    names = ("copies", "shards")[-max(1, len(case.mesh)) :]
    return init_device_mesh("cpu", case.mesh or (dist.get_world_size(),), mesh_dim_names=names)


def made(case: Case, *, shard: bool) -> nn.Module:
    model = case.make()
    for name, p in model.named_parameters():
        if case.frozen and name.startswith(case.frozen):
            p.requires_grad_(False)
    if shard:
        options = {**case.options, "mesh": mesh_of(case)}
        for path in case.units:
            fully_shard(model.get_submodule(path), **options)
        fully_shard(model, **options)
    return model


def step(model: nn.Module, batch: tuple[Tensor, Tensor], *, share: bool) -> float:
    """The gradients of a global batch, and its loss."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    n = BATCH // size
    x, y = (t[rank * n : (rank + 1) * n] for t in batch)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    total = loss.detach().clone()
    if share:
        dist.all_reduce(total)
    return float(total) / size


def train(case: Case, to: Ending, *, share: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the whole parameters and moments at the end."""
    model = made(case, shard=share)
    optimizer = case.optimizer(model)
    schedule = dr.schedules.dynamic_rank(rank=RANK, inflate=INFLATE, deflate=DEFLATE, to=to)
    ranks = dr.RankScheduler(model, optimizer, schedule, STEPS, layers=[*LAYERS[case.make]])
    losses: list[float] = []
    for batch in data():
        losses.append(step(model, batch, share=share))
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    dr.check(model, optimizer, ranks=ranks)
    return losses, values(model, optimizer)


LAYERS: dict[Callable[[], nn.Module], tuple[str, ...]] = {
    mlp: ("0", "2.0", "2.2"),
    convolutions: ("1",),
}


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = whole(value).clone()
    return found


def all_cases(
    names: list[str], share: bool = True
) -> dict[tuple[str, Ending], tuple[list[float], dict[str, Tensor]]]:
    cases = CASES | CASES_OF_FOUR
    return {(n, to): train(cases[n], to, share=share) for n in names for to in cases[n].endings}


def compare(found: Any, expected: Any, cases: dict[str, Case]) -> None:
    for name, to in expected:
        (losses, ours), (known, theirs) = found[name, to], expected[name, to]
        worst = max(abs(a - b) for a, b in zip(losses, known, strict=True))
        assert worst <= cases[name].within, (name, to, worst)
        assert ours.keys() == theirs.keys(), (name, to)
        if cases[name].within < 1e-3:
            for key, value in theirs.items():
                apart = float((ours[key] - value).abs().max())
                assert apart <= 1e-5 * (1 + float(value.abs().max())), (name, to, key, apart)


@pytest.mark.parametrize("part", range(3))
def test_two_processes_equal_one(processes: Pools, part: int) -> None:
    names = [*CASES][part::3]
    found = processes(2)(all_cases, names)
    compare(found[0], all_cases(names, share=False), CASES)
    assert all(one[key][0] == found[0][key][0] for one in found for key in one)


def budgets(share: bool) -> tuple[list[float], dict[str, str]]:
    """A run that is cut to budgets on its own last batches: losses, and the last forms."""
    model = made(CASES["leaves"], shard=share)
    optimizer, losses = sgd(model), list[float]()
    ranks = dr.RankScheduler(model, optimizer, dr.schedules.decay(0.5), STEPS, layers=["0", "2.*"])
    for batch in data():
        losses.append(step(model, batch, share=share))
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    return losses, {path: str(form) for path, form in dr.current_plan(model).items()}


def test_budgets_are_met_on_the_batches_of_all_processes(processes: Pools) -> None:
    losses, forms = budgets(False)
    for found, given in processes(2)(budgets, True):
        assert given == forms
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) <= 1e-5


def test_four_processes_equal_one(processes: Pools) -> None:
    found = processes(4)(all_cases, [*CASES_OF_FOUR])
    compare(found[0], all_cases([*CASES_OF_FOUR], share=False), CASES_OF_FOUR)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """All that a change that fails must leave, by identity and by value."""
    named = dict(model.named_parameters())
    modules = [cast(Any, module) for module in model.modules()]
    units = [module._get_fsdp_state() for module in modules if hasattr(module, "unshard")]
    return (
        {name: (id(p), local_part(p).clone(), p.grad is not None) for name, p in named.items()},
        [type(module) for module in modules],
        [[*map(id, group["params"])] for group in optimizer.param_groups],
        {id(p): {k: id(v) for k, v in state.items()} for p, state in optimizer.state.items()},
        [[*map(id, group.fsdp_params)] for unit in units for group in unit._fsdp_param_groups],
        [len(module._load_state_dict_post_hooks) for module in modules],
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[1:] == after[1:]
    for name, (number, value, grad) in before[0].items():
        assert after[0][name][::2] == (number, grad), name
        assert (
            torch.equal(
                after[0][name][1],
                value,
            )
            or value.isnan().any()
        ), name


def refused(change: Callable[[], object]) -> str:
    """What a change raises."""
    try:
        change()
    except (ValueError, RuntimeError, UnfitWeightError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def all_or_nothing() -> list[str]:
    """Changes that fail in one process, while they are prepared, and when they are committed."""
    model = made(CASES["leaves"], shard=True)
    optimizer, said = adamw(model), list[str]()
    step(model, data()[0], share=True)
    optimizer.step()
    if dist.get_rank() == 1:
        with torch.no_grad():
            local_part(model.get_parameter("2.2.weight"))[0, 0] = torch.nan
    before = state_of(model, optimizer)
    change = lambda: dr.factorize(model, RANK, layers=["0", "2.*"], optimizer=optimizer)  # noqa: E731
    said.append(refused(change))
    assert_same(before, state_of(model, optimizer))
    with torch.no_grad():
        local_part(model.get_parameter("2.2.weight")).nan_to_num_(0.0)
    before, real = state_of(model, optimizer), transaction.check_committed
    try:
        if dist.get_rank() == 1:
            transaction.check_committed = fails
        said.append(refused(change))
    finally:
        transaction.check_committed = real
    assert_same(before, state_of(model, optimizer))
    step(model, data()[1], share=True)
    optimizer.step()
    change()
    step(model, data()[2], share=True)
    optimizer.step()
    dr.merge(model, optimizer=optimizer)
    assert [type(m) for m in model.modules()] == before[1]
    return said


def fails(*_: object) -> None:
    raise RuntimeError("out of memory")


def test_a_change_that_fails_in_one_process_changes_nothing_in_any(processes: Pools) -> None:
    for prepared, committed in processes(2)(all_or_nothing):
        assert prepared == "UnfitWeightError: layer '2.2': its weight holds NaN or infinite values"
        assert "out of memory" in committed


@contextmanager
def counted() -> Generator[list[int]]:
    """The most entries that were gathered at a time, updated at each gathering."""
    alive, most, real = list[weakref.ref[Any]](), [0], sharded.gather

    def gather(*args: Any) -> Tensor | None:
        value = real(*args)
        if value is not None:
            alive.append(weakref.ref(value.untyped_storage()))
        held = [storage for one in alive if (storage := one()) is not None]
        most[0] = max(most[0], sum(storage.nbytes() // 4 for storage in held))
        return value

    sharded.gather = gather
    try:
        yield most
    finally:
        sharded.gather = real


def six_layers() -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    fully_shard(model, mesh=mesh_of(Case()))
    optimizer = adamw(model)
    with counted() as most:
        for form in (dr.LowRank(2), dr.FullRank(), dr.Adapted(2)):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
            dr.apply_plan(model, {str(i): form for i in range(6)}, optimizer=optimizer)
            optimizer.zero_grad()
    return most


def test_a_process_has_one_whole_layer_at_a_time(processes: Pools) -> None:
    whole_layer = 4 * (16 * 16 + 16)  # weight, gradient and two moments, and so of its bias
    for (most,) in processes(2)(six_layers):
        assert 16 * 16 <= most <= whole_layer


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


def refusals() -> dict[str, str]:
    """What cannot be done rightly: each says why, and what to do."""
    said, batch = dict[str, str](), data()[0]
    model = made(CASES["root"], shard=True)
    optimizer = adamw(model)
    cast(Any, model).set_requires_gradient_sync(False)
    model(batch[0]).sum().backward()
    change = lambda: dr.factorize(model, RANK, layers=["0"], optimizer=optimizer)  # noqa: E731
    said["accumulating"] = refused(change)
    hidden = model.get_submodule("2")
    said["part"] = refused(lambda: dr.factorize(hidden, RANK, layers=["*"], optimizer=optimizer))

    model = made(CASES["root"], shard=True)
    optimizer = adamw(model)
    schedule = dr.schedules.dynamic_rank(rank=RANK, inflate=INFLATE, deflate=DEFLATE)
    calibrated: Any = {"layers": ["0"], "moments": "calibrated"}
    said["calibrated"] = refused(
        lambda: dr.RankScheduler(model, optimizer, schedule, STEPS, **calibrated)
    )
    with dr.distributed.independent():
        said["independent"] = refused(change)
    weight = model.get_parameter("0.weight")
    handle = weight.register_hook(_unchanged)
    said["hooks"] = refused(change)
    handle.remove()
    change()
    said["load"] = refused(lambda: model.load_state_dict(dr.merge(mlp()).state_dict()))
    said["balance"] = refused(lambda: balance(model))

    private: Any = fsdp2
    known = private._OF_GROUP
    private._OF_GROUP = (*known, "in_another_version")
    said["version"] = refused(lambda: dr.survey(model))
    private._OF_GROUP = known
    with torch.device("meta"):
        empty = mlp()
    fully_shard(empty, mesh=mesh_of(Case()))
    said["meta"] = refused(lambda: dr.factorize(empty, RANK, layers=["0"]))
    parallel = parallelize_module(mlp(), mesh_of(Case()), {"0": ColwiseParallel()})
    said["tensor parallelism"] = refused(lambda: dr.factorize(parallel, RANK, layers=["0"]))

    model = mlp()
    optimizer = adamw(model)
    ranks = dr.RankScheduler(model, optimizer, schedule, STEPS, layers=["0"])
    fully_shard(model, mesh=mesh_of(Case()))
    step(model, batch, share=True)
    optimizer.step()
    said["order"] = refused(ranks.step)
    return said


def test_what_cannot_be_done_is_refused_by_name(processes: Pools) -> None:
    for said in processes(2)(refusals):
        assert "not yet reduced" in said["accumulating"], said
        assert "give the model that it was called on" in said["part"]
        assert "use moments='project'" in said["calibrated"]
        assert "sharded over the processes [0, 1]" in said["independent"]
        assert "gradient hooks" in said["hooks"]
        assert "bring it to the state's forms first" in said["load"], said
        assert "balance factors before it" in said["balance"]
        assert "does not have FSDPParamGroup.in_another_version" in said["version"]
        assert "They were tried with torch 2.13" in said["version"]
        assert "on the meta device" in said["meta"]
        assert "sharded by tensor parallelism" in said["tensor parallelism"]
        assert "in the order model, fully_shard, optimizer, RankScheduler" in said["order"]


def resumed(late: bool) -> float:
    """The largest difference of losses between a run and one resumed from its middle.

    ``late``: the state is loaded into a scheduler that has applied its first plan already.
    """
    first = _Run.made()
    for at in range(6):
        first.step(at)
    model, optimizer, ranks = (copy.deepcopy(one.state_dict()) for one in first.parts)
    second = _Run.made(None if late else ranks)
    if late:
        second.ranks.load_state_dict(ranks)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    return max(abs(first.step(at) - second.step(at)) for at in range(6, STEPS))


@dataclass
class _Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: dr.RankScheduler

    @classmethod
    def made(cls, state: Any = None) -> _Run:
        model = made(CASES["nested"], shard=True)
        optimizer = adamw(model)
        schedule = dr.schedules.dynamic_rank(rank=RANK, inflate=INFLATE, deflate=DEFLATE)
        layers: Any = [*LAYERS[mlp]]
        ranks = dr.RankScheduler(model, optimizer, schedule, STEPS, layers=layers, state=state)
        return cls(model, optimizer, ranks)

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        return self.model, self.optimizer, self.ranks

    def step(self, at: int) -> float:
        loss = step(self.model, data()[at], share=True)
        self.optimizer.step()
        self.ranks.step()
        self.optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("late", [False, True], ids=["from state", "loaded later"])
def test_a_resumed_run_goes_on_bit_by_bit(processes: Pools, late: bool) -> None:
    assert processes(2)(resumed, late) == [0.0, 0.0]


def reading() -> tuple[dict[str, float], str]:
    """The stable ranks of sharded weights, and what a process is told that reads alone."""
    from dynarank.distributed.processes import processes_of
    from dynarank.monitors.spectral_reading import read_spectra

    model = made(CASES["leaves"], shard=True)
    dr.factorize(model, RANK, layers=["0"])
    found = read_spectra([site for site in dr.survey(model) if site.form is not None])
    alone = lambda: read_spectra(dr.survey(model)[:1])  # noqa: E731
    together = processes_of(*model.modules())
    other = lambda: together.agree("another thing", None)  # noqa: E731
    said = refused(alone if dist.get_rank() == 0 else other)
    return {path: one.stable_rank for path, one in found.items()}, said


def test_spectra_are_read_layer_by_layer_and_by_all(processes: Pools) -> None:
    from dynarank.monitors.spectral_reading import read_spectra

    model = dr.factorize(mlp(), RANK, layers=["0"])
    expected = read_spectra([site for site in dr.survey(model) if site.form is not None])
    for found, said in processes(2)(reading):
        assert found == {path: one.stable_rank for path, one in expected.items()}
        assert "reading layer '0', which is sharded" in said


def unlike_ways() -> dict[str, float]:
    """The largest difference of losses from a plain model's, by what is unlike in the sharding."""
    ways: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object], tuple[str, ...]]] = {
        "compiled blocks": (mlp, _compiled_block, ("0", "2.0")),
        "tied": (Tied, _root, ("embedding",)),
        "one layer": (lambda: nn.Linear(16, 3), _root, ("",)),
        "together": (mlp, _two_together, ("0", "2.0")),
        "factorized before": (_factorized, _first_and_root, ("0", "2.0")),
        "converted after": (mlp, _converted, ("0", "2.0")),
    }
    return {name: apart(*way) for name, way in ways.items()}


def _root(model: Any) -> None:
    fully_shard(model, mesh=mesh_of(Case()))


def _compiled_block(model: Any) -> None:
    fully_shard(model[2], mesh=mesh_of(Case()))
    model[2].compile(backend="eager")
    _root(model)


def _two_together(model: Any) -> None:
    fully_shard([model[0], model[3]], mesh=mesh_of(Case()))
    _root(model)


def _factorized() -> nn.Module:
    with dr.distributed.independent():
        return dr.factorize(mlp(), RANK + 1, layers=["0", "2.0"])


def _first_and_root(model: Any) -> None:
    fully_shard(model[0], mesh=mesh_of(Case()))
    _root(model)


def _converted(model: Any) -> None:
    _root(model)
    model.float()
    for module in model.modules():  # as to_empty does with parameters on the meta device
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(p.detach().clone()))


def apart(
    make: Callable[[], nn.Module], shard: Callable[[Any], object], paths: tuple[str, ...]
) -> float:
    """Over an accumulation of gradients that goes on through each change."""
    torch.manual_seed(0)
    plain = make()
    model, worst = copy.deepcopy(plain), 0.0
    shard(model)
    both = [(model, adamw(model)), (plain, adamw(plain))]
    for at, form in enumerate((dr.LowRank(RANK), dr.FullRank(), dr.Adapted(RANK))):
        first = [step(one, data()[2 * at], share=one is model) for one, _ in both]
        for one, optimizer in both:
            with dr.distributed.independent() if one is plain else _nothing():
                dr.apply_plan(one, dict.fromkeys(paths, form), optimizer=optimizer)
        second = [step(one, data()[2 * at + 1], share=one is model) for one, _ in both]
        worst = max(worst, abs(first[0] - first[1]), abs(second[0] - second[1]))
        for _, optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return worst


@contextmanager
def _nothing() -> Generator[None]:
    yield


class Tied(nn.Module):
    """The output layer multiplies by the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.embedding(x.argmax(1)))


def test_other_ways_to_shard(processes: Pools) -> None:
    for found in processes(2)(unlike_ways):
        assert max(found.values()) <= 1e-5, found


def gpt2_blocks() -> list[float]:
    transformers = pytest.importorskip("transformers")
    names = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**names, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config)
    model, apart = copy.deepcopy(plain), list[float]()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh_of(Case()))
    fully_shard(model, mesh=mesh_of(Case()))
    both = [(model, adamw(model)), (plain, adamw(plain))]
    ids = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    mine = ids[2 * dist.get_rank() :][:2]
    plan = [f"transformer.h.{i}.{k}" for i in (0, 1) for k in ("attn.c_attn", "mlp.c_fc")]
    for form in (dr.LowRank(3), dr.FullRank(), dr.Adapted(3), dr.LowRank(2)):
        losses: list[Tensor] = []
        for one, optimizer in both:
            with dr.distributed.independent() if one is plain else _nothing():
                dr.apply_plan(one, dict.fromkeys(plan, form), optimizer=optimizer)
            batch = mine if one is model else ids
            loss = one(batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().clone())
        dist.all_reduce(losses[0])
        apart.append(abs(float(losses[0]) / 2 - float(losses[1])))
    return apart


def test_gpt2_by_blocks(processes: Pools) -> None:
    for apart in processes(2)(gpt2_blocks):
        assert max(apart) <= 1e-5


def after_an_evaluation(folder: Path) -> list[str]:
    """A forward pass without a backward one leaves the root's parameters whole."""
    model, said, x = made(CASES["nested"], shard=True), list[str](), torch.ones(2, 16)
    optimizer = adamw(model)
    step(model, data()[0], share=True)
    optimizer.step()
    load = lambda: dr.load(folder, model=model, optimizer=optimizer)  # noqa: E731
    dr.save(folder, model=model, optimizer=optimizer)
    for what in (lambda: dr.check(model, optimizer), load):
        with torch.no_grad():
            model(x)
        assert not hasattr(model.get_parameter("0.weight"), "placements")
        said.append(refused(what))
    return said


def test_an_evaluation_before_a_check_or_a_load_changes_nothing(
    processes: Pools, tmp_path: Path
) -> None:
    for said in processes(2)(after_an_evaluation, tmp_path / "last"):
        assert said == ["not refused", "not refused"]


def _warns(*_: object) -> None:
    raise UserWarning("a filter makes an error of it")


def warned_in_one() -> str:
    model = made(CASES["root"], shard=True)
    optimizer, real = adamw(model), transaction.warn_of_losses
    before = state_of(model, optimizer)
    try:
        if dist.get_rank() == 1:
            transaction.warn_of_losses = _warns
        return refused(lambda: dr.factorize(model, RANK, layers=["0"], optimizer=optimizer))
    except UserWarning as warning:
        return repr(warning)
    finally:
        transaction.warn_of_losses = real
        assert_same(before, state_of(model, optimizer))


def test_a_warning_that_one_process_makes_an_error_is_told_to_all(processes: Pools) -> None:
    first, second = processes(2)(warned_in_one)
    assert first.startswith("PeerError: a change of forms failed in process 1: UserWarning")
    assert second.startswith("UserWarning(")
