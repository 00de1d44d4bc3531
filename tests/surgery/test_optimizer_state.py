"""Law 5 and 6: the optimizer's groups through a change of form, and the policies for its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import DECOMPOSITIONS, LAYERS, LayerCase
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.surgery.sites import survey

F64 = torch.float64


def stepped(case: LayerCase, steps: int = 5) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    x = torch.randn(case.shape, dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run(model, optimizer, x, steps)
    return model, optimizer, x


def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) + 0.1).pow(3).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", [LowRank(3), Adapted(3)], ids=str)
def test_reset_forgets_the_layer_and_nothing_else(form: LowRank | Adapted) -> None:
    model, optimizer, x = stepped(LAYERS[0])
    bias = {k: v.clone() for k, v in optimizer.state[model[0].bias].items()}
    dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments="reset")
    assert set(optimizer.state) == {model[0].bias}
    assert all(torch.equal(v, bias[k]) for k, v in optimizer.state[model[0].bias].items())
    run(model, optimizer, x, 1)
    assert optimizer.state[model[0].up]["step"] == 1


def test_an_optimizer_that_has_not_stepped_has_nothing_to_move() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    dr.factorize(model, 2, optimizer=optimizer)
    assert not optimizer.state


def test_plain_sgd_has_no_moments() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, optimizer, torch.randn(3, 8), 2)
    dr.factorize(model, 2, optimizer=optimizer)
    run(model, optimizer, torch.randn(3, 8), 1)


def test_an_unknown_state_is_refused_under_project_and_dropped_under_reset() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.Rprop(model.parameters())
    run(model, optimizer, torch.randn(3, 8), 1)
    before = model[0].weight
    with pytest.raises(ValueError, match=r"keeps prev, step_size, which cannot be .*'reset'"):
        dr.factorize(model, 2, optimizer=optimizer)
    assert model[0].weight is before and type(model[0]) is nn.Linear
    with pytest.raises(
        ValueError, match=r"'project', 'calibrated', 'reset', 'prune' or .*, got 'keep'"
    ):
        dr.factorize(model, 2, optimizer=optimizer, moments="keep")  # type: ignore[arg-type]


def test_groups_keep_their_order_place_options_and_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(
        [
            {"params": list(model[0].named_parameters()), "lr": 0.3},
            {"params": [("net.1.weight", model[1].weight), ("net.2.weight", model[2].weight)]},
            {"params": [("net.1.bias", model[1].bias), ("net.2.bias", model[2].bias)]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    groups = list(map(id, optimizer.param_groups))
    dr.factorize(model, 2, layers="1", optimizer=optimizer)
    assert list(map(id, optimizer.param_groups)) == groups
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[1] == [id(model[1].down), id(model[1].up), id(model[2].weight)]
    assert optimizer.param_groups[1]["param_names"] == ["net.1.down", "net.1.up", "net.2.weight"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.1]
    dr.deflate(dr.inflate(model, optimizer=optimizer), 2, optimizer=optimizer)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[1] == [id(model[1].down), id(model[1].up), id(model[2].weight)]  # no frozen base
    dr.merge(model, optimizer=optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["net.1.weight", "net.2.weight"]
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_frozen_base_stays_bit_identical_and_the_adapter_moves() -> None:
    model, optimizer, x = stepped(LAYERS[0])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    dr.deflate(model, 2, layers="*", optimizer=optimizer)
    base = model[0].base.detach().clone()
    factors = [f.detach().clone() for f in survey(model)[0].factors()]
    run(model, optimizer, x, 20)
    assert torch.equal(model[0].base, base)
    assert not any(
        torch.equal(f, old) for f, old in zip(survey(model)[0].factors(), factors, strict=True)
    )


def test_without_gradients_calibrated_projects() -> None:
    """The verbs called directly have no gradients to calibrate by."""
    states = []
    for moments in ("project", "calibrated"):
        model, optimizer, _ = stepped(LAYERS[0])
        dr.factorize(model, 3, layers="0", optimizer=optimizer, moments=moments)
        states.append([optimizer.state[p] for p in (model[0].down, model[0].up)])
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


OPTIONS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3, fused=True),
    "maximize": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "tensor-rate": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), foreach=False),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
}


@pytest.mark.parametrize("moments", ["project", "reset"])
@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_training_goes_on_in_every_variant(kind: str, moments: str) -> None:
    """Each factor moves in the step after each change, each state fits, and all is saved."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = OPTIONS[kind](model.parameters())
    run(model, optimizer, x, 6)
    for form in (LowRank(3), dr.FullRank(), Adapted(2), LowRank(2)):
        dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments=moments)
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        run(model, optimizer, x, 2)
        for name, p in model.named_parameters():
            assert torch.equal(p, old[name]) != p.requires_grad, name
        for p, state in optimizer.state.items():
            assert all(v.shape in (p.shape, ()) for v in state.values() if v is not None)
        optimizer.load_state_dict(optimizer.state_dict())


# Every optimizer of torch: its state moves, or it is refused by name and can be reset.

STAYS = {"LBFGS", "Rprop"}
ALL = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "SparseAdam")  # which takes no gradients of a layer that changes
)


def taught(kind: str, **options: object) -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
    """A model of matrices, an optimizer, and a function that steps once; three steps are done."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6, bias=False))
    x = torch.randn(16, 8)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) + 0.1).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return model, optimizer, lambda: optimizer.step(closure)


def assert_goes_on(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any) -> None:
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        step()
    for name, p in model.named_parameters():
        assert torch.equal(p, old[name]) != p.requires_grad and p.isfinite().all(), name
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", ALL)
def test_every_optimizer_of_torch_moves_or_is_refused(kind: str) -> None:
    options = {"momentum": 0.9} if kind == "SGD" else {}
    model, optimizer, step = taught(kind, **options)
    weight = model[1].weight
    if kind not in STAYS:
        dr.factorize(model, 3, layers="1", optimizer=optimizer)
        assert all(p in optimizer.state for p in (model[1].down, model[1].up))
    else:
        with pytest.raises(ValueError, match="moments='reset'"):
            dr.factorize(model, 3, layers="1", optimizer=optimizer)
        assert model[1].weight is weight and optimizer.state
    assert_goes_on(model, optimizer, step)
    for form in (LowRank(3), dr.FullRank(), Adapted(2), LowRank(2)):
        dr.apply_plan(model, {"1": form, "0": form}, optimizer=optimizer, moments="reset")
        assert_goes_on(model, optimizer, step)


@pytest.mark.parametrize("kind", ALL)
def test_the_scheduler_refuses_at_once_what_it_could_not_move(kind: str) -> None:
    model, optimizer, _ = taught(kind)
    schedule = dr.schedules.dynamic_rank(2, inflate=3, deflate=6)
    if kind not in STAYS:
        dr.RankScheduler(model, optimizer, schedule, 9, layers="*")
    else:
        with pytest.raises(ValueError, match=rf"{kind} cannot be moved .* moments='reset'"):
            dr.RankScheduler(model, optimizer, schedule, 9, layers="*")


def test_only_the_rows_of_a_sparse_table_train_with_sparse_adam() -> None:
    model = nn.Sequential(nn.Embedding(8, 8, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    with pytest.raises(ValueError, match="sparse acts on rows"):
        dr.factorize(model, 2, layers="*", optimizer=optimizer)


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675: its decay is decoupled, which its groups do not say."""

    def __init__(self, parameters: Any, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            one, two = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, mean, one).sign(), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - two)


DECOUPLED = {
    "AdamW": lambda p, decay: torch.optim.AdamW(p, 1e-3, weight_decay=decay),
    "Adam": lambda p, decay: torch.optim.Adam(
        p, 1e-3, weight_decay=decay, decoupled_weight_decay=True
    ),
    "Muon": lambda p, decay: torch.optim.Muon(p, 1e-3, weight_decay=decay),
    "Lion": lambda p, decay: Lion(p, 1e-3, decay),
}


@pytest.mark.parametrize("form", [LowRank(3), Adapted(3)], ids=str)
@pytest.mark.parametrize("kind", sorted(DECOUPLED))
def test_decoupled_decay_is_no_part_of_a_moment(kind: str, form: LowRank | Adapted) -> None:
    """The moments move as without decay."""
    moved: list[list[Tensor]] = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        optimizer = DECOUPLED[kind](model.parameters(), 0.0)
        run(model, optimizer, torch.randn(16, 8), 3)
        optimizer.param_groups[0]["weight_decay"] = decay
        states = []
        for one in (form, dr.FullRank()):
            dr.apply_plan(model, {"0": one}, optimizer=optimizer)
            states += [v for s in optimizer.state.values() for v in s.values()]
        moved.append(states)
    assert all(torch.equal(one, two) for one, two in zip(*moved, strict=True))


def test_l2_decay_is_separated_also_in_a_subclass() -> None:
    class Own(torch.optim.SGD):
        pass

    moved: list[Tensor] = []
    for kind in (torch.optim.SGD, Own):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        optimizer = kind(model.parameters(), 0.01, momentum=0.9, weight_decay=0.5)
        run(model, optimizer, torch.randn(16, 8), 3)
        dr.apply_plan(model, {"0": LowRank(3)}, optimizer=optimizer)
        moved.append(optimizer.state[model[0].up]["momentum_buffer"])
    assert torch.equal(*moved)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_factors_of_a_matrix_are_matrices_as_muon_needs_them(decomposition: str) -> None:
    model, optimizer, step = taught("Muon")
    for form in (LowRank(2, decomposition), Adapted(2, decomposition), dr.FullRank()):
        dr.apply_plan(model, {"1": form}, optimizer=optimizer)
        assert_goes_on(model, optimizer, step)


def test_a_state_keeps_its_own_dtype() -> None:
    """As optimizers with fp32 averages for bf16 weights need it."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    optimizer = Lion(model.parameters())
    optimizer.state[model[0].weight]["exp_avg"] = torch.randn(8, 8)
    dr.factorize(model, 3, layers="*", optimizer=optimizer)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_a_state_that_is_no_dictionary_is_refused_or_dropped() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight] = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"keeps Tensor, which cannot be moved .* moments='reset'"):
        dr.factorize(model, 2, layers="*", optimizer=optimizer)
    dr.factorize(model, 2, layers="*", optimizer=optimizer, moments="reset")
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [{"betas": (0.9, 0.92, 0.99)}, {"betas": 0.9}, {"momentum": None, "weight_decay": None}],
)
def test_options_of_other_optimizers_are_no_obstacle_to_a_refusal(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = Lion(model.parameters())
    run(model, optimizer, torch.randn(3, 8), 1)
    optimizer.param_groups[0] |= options
    optimizer.state[model[0].weight]["previous_gradient"] = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"keeps previous_gradient, which .* moments='reset'"):
        dr.factorize(model, 2, layers="*", optimizer=optimizer)
    dr.factorize(model, 2, layers="*", optimizer=optimizer, moments="reset")


def test_a_state_of_no_parameter_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, optimizer, torch.randn(3, 8), 1)
    optimizer.state["steps"] = 7
    dr.factorize(model, 2, layers="*", optimizer=optimizer)
    assert optimizer.state["steps"] == 7


def test_a_shared_state_stays_shared() -> None:
    """As training in several processes (Hogwild) has it."""
    model = nn.Sequential(nn.Linear(8, 8)).share_memory()
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, optimizer, torch.randn(3, 8), 1)
    optimizer.state[model[0].weight]["exp_avg"].share_memory_()
    dr.factorize(model, 2, layers="*", optimizer=optimizer)
    assert optimizer.state[model[0].up]["exp_avg"].is_shared()
    assert not optimizer.state[model[0].up]["exp_avg_sq"].is_shared()


def test_the_scheduler_refuses_at_once_a_layer_in_no_optimizer_that_changes_later() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    schedule = dr.schedules.pufferfish(2, switch=5)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'1' trains, but no optimizer given holds"):
        dr.RankScheduler(model, optimizer, schedule, 9, layers="*")
    model[1].weight.requires_grad_(False)
    dr.RankScheduler(model, optimizer, schedule, 9, layers="*")


class SquaresOnly(Lion):
    """An optimizer that averages nothing but squares."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state["exp_avg_sq"] = state.pop("exp_avg").square()


def test_squares_move_without_a_first_moment() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = SquaresOnly(model.parameters())
    run(model, optimizer, torch.randn(3, 8), 1)
    square = optimizer.state[model[0].weight]["exp_avg_sq"]
    dr.factorize(model, 2, layers="*", optimizer=optimizer)
    moved = optimizer.state[model[0].up]["exp_avg_sq"]
    torch.testing.assert_close(moved, square @ model[0].down.detach().T.square())


# What cannot be moved is refused early, wherever it hides.


class WithMemory(Lion):
    """An optimizer with an entry that no one but its author knows."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["memory"] = torch.zeros_like(p)


def scheduled(
    optimizer: Callable[[Any], Any], schedule: Any, moments: Any = "project"
) -> Callable[[], object]:
    """A function that makes one step of a run of ten."""
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    made = optimizer(model.parameters())
    ranks = dr.RankScheduler(model, made, schedule, 10, layers="*", moments=moments)

    def step() -> None:
        made.zero_grad()
        model(x).square().mean().backward()
        made.step()
        ranks.step()

    return step


LATE = dr.schedules.dynamic_rank(2, inflate=6, deflate=8)


def test_a_state_that_cannot_be_moved_later_is_refused_at_the_first_step() -> None:
    step = scheduled(WithMemory, LATE)
    with pytest.raises(ValueError, match=r"keeps memory, which cannot .* moments='reset'"):
        step()


def test_it_is_no_obstacle_where_nothing_has_to_be_moved() -> None:
    for moments, schedule in (("reset", LATE), ("project", dr.schedules.low_rank(2))):
        step = scheduled(WithMemory, schedule, moments)
        for _ in range(9):
            step()


def test_a_schedule_that_decides_as_it_goes_may_change_every_layer() -> None:
    step = scheduled(WithMemory, dr.schedules.closed_loop(4))
    with pytest.raises(ValueError, match="keeps memory"):
        step()


class Wrapper:
    """As Lightning and accelerate wrap an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)


def accelerated(optimizer: torch.optim.Optimizer) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(optimizer)


@pytest.mark.parametrize("wrap", [Wrapper, accelerated])
def test_wrappers_hide_nothing(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"state of Rprop cannot be moved .* moments='reset'"):
        scheduled(lambda p: wrap(torch.optim.Rprop(p)), LATE)
    step = scheduled(lambda p: wrap(WithMemory(p)), LATE)
    with pytest.raises(ValueError, match=r"keeps memory, which cannot .* moments='reset'"):
        step()
    step = scheduled(lambda p: wrap(torch.optim.Adafactor(p)), LATE)
    for _ in range(9):
        step()


# Several groups.


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("Adam", {"amsgrad": True}),
        ("RMSprop", {"momentum": 0.9}),
        ("RMSprop", {"centered": True}),
        ("SGD", {"momentum": 0.9}),
        ("NAdam", {"momentum_decay": 1e-2}),
        ("Adagrad", {"initial_accumulator_value": 0.5}),
    ],
)
def test_a_parameter_gets_what_its_own_group_needs(kind: str, option: dict[str, Any]) -> None:
    """Factors in two groups, one with the option: through full rank and back."""
    torch.manual_seed(0)
    model, x = dr.factorize(nn.Sequential(nn.Linear(8, 8)), 3, layers="*"), torch.randn(4, 8)
    groups = [{"params": [model[0].down]}, {"params": [model[0].up, model[0].bias], **option}]
    optimizer = getattr(torch.optim, kind)(groups, lr=1e-3)
    for form in (dr.FullRank(), LowRank(2), Adapted(2), dr.FullRank()):
        run(model, optimizer, x, 3)
        dr.apply_plan(model, {"0": form}, optimizer=optimizer)
        run(model, optimizer, x, 3)
        assert all(p.isfinite().all() for p in model.parameters())
