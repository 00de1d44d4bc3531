"""What the verbs refuse, how they choose layers, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, UnfitWeightError
from dynarank.forms import Form
from dynarank.surgery import sites
from dynarank.surgery.edit import Edit
from dynarank.surgery.selection import find_sites


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def trained(model: nn.Module, shape: tuple[int, ...] = (8, 16)) -> torch.optim.Optimizer:
    """An optimizer that has stepped, so that there is state to lose."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    return optimizer


class Snapshot:
    """Everything a refused change must leave alone, by identity and by value."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.taken = self.take()

    def take(self) -> tuple[object, ...]:
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return (
            [(n, id(m), type(m)) for n, m in self.model.named_modules()],
            [(n, id(p), p.requires_grad) for n, p in self.model.named_parameters()],
            [p if p.is_meta else p.detach().clone() for p in self.model.parameters()],
            [id(p) for g in self.optimizer.param_groups for p in g["params"]],
            {id(p) for p in self.optimizer.state},
            [v for s in optimizer["state"].values() for v in s.values()],
            torch.get_rng_state(),
        )

    def assert_unchanged(self) -> None:
        def equal(one: object, two: object) -> bool:
            if isinstance(one, Tensor) and isinstance(two, Tensor):
                return one is two or torch.equal(one.nan_to_num(1e9), two.nan_to_num(1e9))
            if isinstance(one, list | tuple) and isinstance(two, list | tuple):
                return len(one) == len(two) and all(map(equal, one, two))
            return one == two

        assert equal(self.taken, self.take())


def weight_norm(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[2])


def old_weight_norm(model: nn.Sequential) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])


def tie(model: nn.Sequential) -> None:
    model.append(nn.EmbeddingBag(32, 32))  # of a kind that cannot follow
    model[2].weight = model[5].weight


def tie_memory(model: nn.Sequential) -> None:
    model.append(nn.Linear(32, 32))
    model[2].weight = nn.Parameter(model[5].weight.detach())


def poison(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[3, 3] = float("nan")


def hook(model: nn.Sequential) -> None:
    model[2].weight.register_hook(lambda grad: grad)


def late_hook(model: nn.Sequential) -> None:
    model[2].weight.register_post_accumulate_grad_hook(lambda p: None)


def blow_up(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")


# fmt: off
REFUSED: list[tuple[str, Callable[[nn.Sequential], None], dict[str, Form], str]] = [
    ("unknown", lambda m: None, {"0": LowRank(2), "4x": LowRank(2)}, r"no layer '4x'; nearest"),
    ("above", lambda m: None, {"0": LowRank(2), "4": LowRank(5)}, r"'4': rank 5 is above"),
    ("adapted-above", lambda m: None, {"4": Adapted(99)}, r"rank 99 is above the limit 4"),
    ("no-weight", lambda m: None, {"0": LowRank(2), "1": LowRank(2)}, r"'1' cannot .*no weight"),
    ("root", lambda m: None, {"": LowRank(2)}, r"layer '' cannot change form"),
    ("method", lambda m: None, {"0": LowRank(2, "qr")}, r"unknown decomposition 'qr'; known: svd"),
    ("parametrized", weight_norm, {"0": LowRank(2), "2": LowRank(2)}, r"'2' .*parametrize"),
    ("weight-norm", old_weight_norm, {"2": LowRank(2)}, r"from bias, weight_g, weight_v"),
    ("tied", tie, {"0": LowRank(2), "2": LowRank(2)}, r"'2' .*tied to 5.weight"),
    ("tied-memory", tie_memory, {"2": LowRank(2)}, r"'2' .*tied to 5.weight"),
    ("nan", poison, {"0": LowRank(2), "2": LowRank(2)}, r"'2': its weight holds NaN"),
    ("inf", blow_up, {"2": Adapted(2)}, r"'2': its weight holds NaN or infinite"),
    ("hook", hook, {"0": LowRank(2), "2": LowRank(2)}, r"'2': its weight has gradient hooks"),
    ("late-hook", late_hook, {"2": LowRank(2)}, r"'2': its weight has gradient hooks"),
    ("meta", lambda m: m[2].to("meta"), {"2": LowRank(2)}, r"on the meta device"),  # type: ignore[misc, list-item]
]
# fmt: on


@pytest.mark.parametrize(
    ("damage", "plan", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_a_refused_plan_changes_nothing(
    damage: Callable[[nn.Sequential], None], plan: dict[str, Form], words: str
) -> None:
    model = mlp()
    optimizer = trained(model)
    damage(model)
    before = Snapshot(model, optimizer)
    with pytest.raises(ValueError, match=words):
        dr.apply_plan(model, plan, optimizer=optimizer)
    before.assert_unchanged()


@pytest.mark.parametrize("damage", [weight_norm, tie, poison], ids=lambda f: f.__name__)
def test_factorize_refuses_what_it_would_handle_wrongly(
    damage: Callable[[nn.Sequential], None],
) -> None:
    model = mlp()
    optimizer = trained(model)
    damage(model)
    before = Snapshot(model, optimizer)
    layers = "2" if damage is weight_norm else None  # by default it is left
    with pytest.raises(ValueError, match="'2'"):
        dr.factorize(model, 2, layers=layers, optimizer=optimizer)
    before.assert_unchanged()
    dr.factorize(model, 2, layers=["0", "4"], optimizer=optimizer)
    assert dr.current_plan(model)["0"] == LowRank(2)


def test_a_weight_that_is_not_finite_has_an_error_of_its_own() -> None:
    model = mlp()
    poison(model)
    with pytest.raises(UnfitWeightError):
        dr.factorize(model, 2)


@pytest.mark.parametrize("rank", [0, -1, 1.5, -0.5, 0.0, float("nan")])
@pytest.mark.parametrize("verb", [dr.factorize, dr.deflate])
def test_impossible_ranks(verb: Callable[..., nn.Module], rank: float) -> None:
    model = mlp()
    optimizer = trained(model)
    before = Snapshot(model, optimizer)
    with pytest.raises(ValueError, match="rank"):
        verb(model, rank, optimizer=optimizer)
    before.assert_unchanged()


def test_a_rank_above_every_limit_is_an_error_and_names_the_layers() -> None:
    with pytest.raises(ValueError, match=r"rank 100 makes no layer .* cheaper"):
        dr.factorize(mlp(), 100)
    with pytest.raises(ValueError, match=r"layer '0': rank 100 is above the limit 16"):
        dr.factorize(mlp(), 100, layers="0")


def test_an_exception_while_committing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = trained(model)
    before = Snapshot(model, optimizer)
    committed: list[str] = []
    original = Edit.commit

    def fail_at_second(self: Edit, undo: ExitStack) -> None:
        committed.append(self.site.path)
        if len(committed) == 2:
            raise KeyboardInterrupt
        original(self, undo)

    monkeypatch.setattr("dynarank.surgery.edit.Edit.commit", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        dr.apply_plan(model, {"0": LowRank(2), "4": LowRank(2)}, optimizer=optimizer)
    before.assert_unchanged()


def test_merge_is_all_or_nothing_where_a_layer_cannot_follow() -> None:
    model = dr.inflate(dr.factorize(mlp(), 2, layers="*"), layers="0")
    optimizer = trained(model)
    handle = model[2].up.register_hook(lambda grad: grad)
    before = Snapshot(model, optimizer)
    with pytest.raises(ValueError, match="'2': its up has gradient hooks"):
        dr.merge(model, optimizer=optimizer)
    before.assert_unchanged()
    handle.remove()
    assert [type(m) for m in dr.merge(model, optimizer=optimizer)] == [type(m) for m in mlp()]


def test_an_exception_after_the_optimizer_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(mlp(), 2, layers="*")
    optimizer = trained(model)
    before = Snapshot(model, optimizer)
    monkeypatch.setattr("dynarank.surgery.transaction.check_committed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dr.inflate(model, optimizer=optimizer)
    before.assert_unchanged()


def test_a_layer_in_no_optimizer_or_in_two() -> None:
    model = mlp()
    half = torch.optim.SGD(model[0].parameters(), lr=0.1)
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'2' trains, but no optimizer given holds"):
        dr.factorize(model, 2, layers=["0", "2"], optimizer=half)
    dr.factorize(model, 2, layers=["0", "2"], optimizer=[half, other])
    assert {id(p) for p in half.param_groups[0]["params"]} == {id(p) for p in model[0].parameters()}
    with pytest.raises(ValueError, match="two optimizers hold"):
        dr.inflate(model, layers="0", optimizer=[half, torch.optim.SGD(model.parameters(), lr=1.0)])


# Which layers a verb means.


def test_by_default_the_layers_that_get_cheaper() -> None:
    model = dr.factorize(mlp(), 6)
    assert dr.current_plan(model) == {"0": LowRank(6), "2": LowRank(6), "4": FullRank()}
    dr.inflate(model)
    dr.deflate(model, 8)  # those that are ranked, whatever it costs
    assert dr.current_plan(model) == {"0": Adapted(8), "2": Adapted(8), "4": FullRank()}


def test_what_is_ranked_can_change_beside_layers_that_are_refused() -> None:
    """GPT-style: the tied head is left out once, then never in the way again."""
    model = mlp()
    tie(model)
    with pytest.raises(ValueError, match="tied to"):
        dr.factorize(model, 2)
    dr.factorize(model, 2, layers="0")
    dr.merge(dr.deflate(dr.inflate(model)))
    assert model[2].weight is model[5].weight


def test_a_share_is_of_each_layer_and_never_above_its_limit() -> None:
    model = dr.factorize(mlp(), dr.Rank(1.0, of="out"), layers="*")
    assert [dr.current_plan(model)[p].rank for p in "024"] == [16, 32, 4]  # type: ignore[union-attr]
    dr.factorize(model, 0.5)
    assert [dr.current_plan(model)[p].rank for p in "024"] == [5, 8, 1]  # type: ignore[union-attr]


def test_filters_and_patterns() -> None:
    model = dr.factorize(mlp(), 2, layers=lambda module, path: module.out_features == 32)
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == [
        "RankedLinear",
        "RankedLinear",
        "Linear",
    ]
    with pytest.raises(ValueError, match=r"'conv\*' matches no layer .* '0' "):
        dr.factorize(mlp(), 2, layers="conv*")


def test_layers_that_are_not_handled_are_left_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.EmbeddingBag(20, 16), nn.Linear(16, 32), nn.Embedding(9, 9, max_norm=1.0),
        nn.Bilinear(8, 8, 2), nn.Embedding(9, 9),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="dynarank"):
        dr.factorize(model, 2)
    assert "left as they are: 0, 2, 3, 4" in caplog.text
    obstacles = {site.path: site.obstacle for site in dr.survey(model)}
    assert obstacles == {
        "0": "EmbeddingBag layers are not handled",
        "1": "",
        "2": "its max_norm acts on rows of the whole weight",
        "3": "Bilinear layers are not handled",
        "4": "",
    }
    with pytest.raises(ValueError, match="'3' cannot change form: Bilinear layers"):
        dr.apply_plan(model, {"3": LowRank(2)})
    with pytest.raises(ValueError, match="'2': its max_norm acts on rows"):
        dr.factorize(model, 2, layers="*")


def test_lazy_layers_and_other_forward_passes_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(16, 32), Own(32, 32))
    dr.factorize(model, 2)
    obstacles = {site.path: site.obstacle for site in dr.survey(model)}
    assert obstacles["2"] == "its class Own overrides forward of Linear"
    assert "lazy" in obstacles["0"]
    assert dr.current_plan(model) == {"1": LowRank(2)}


@pytest.mark.parametrize("wrapper", ["FullyShardedDataParallel"])
def test_a_wrapped_model_is_refused(wrapper: str) -> None:
    class Base(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = type(wrapper, (Base,), {})(mlp())
    with pytest.raises(ValueError, match=f"wrapped by {wrapper}.*before wrapping"):
        dr.factorize(wrapped, 2)


def test_deflate_returns_to_the_last_rank_or_asks_for_one() -> None:
    model = dr.inflate(dr.factorize(mlp(), 3))
    assert dr.current_plan(dr.deflate(model, to="low-rank"))["0"] == LowRank(3)
    with pytest.raises(ValueError, match="never had factors"):
        dr.deflate(mlp(), layers="0")
    with pytest.raises(ValueError, match=r'"adapted" or "low-rank", got .lora.'):
        dr.deflate(model, to="lora")  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [{"0": None}, {"0": "low-rank"}, {"0": LowRank}, {0: LowRank(2)}])
def test_a_plan_of_something_else_is_refused(plan: dict[str, Form]) -> None:
    with pytest.raises(TypeError, match="a plan maps paths"):
        dr.apply_plan(mlp(), plan)
    with pytest.raises(TypeError, match="optimizer is a torch optimizer or a list of them, got 3"):
        dr.factorize(mlp(), 2, optimizer=3)  # type: ignore[arg-type]


def test_optimizers_may_come_from_a_generator() -> None:
    model = mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model[0], model[2], model[4])]
    dr.factorize(model, 2, layers="*", optimizer=(one for one in optimizers))
    assert [len(one.param_groups[0]["params"]) for one in optimizers] == [3, 3, 3]


def test_a_change_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = mlp()
    optimizer = trained(model)
    with torch.inference_mode():
        dr.factorize(model, 2, optimizer=optimizer)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()


def test_moments_that_are_not_finite_do_not_spread() -> None:
    model = mlp()
    optimizer = trained(model)
    optimizer.state[model[2].weight]["exp_avg"][0, 0] = float("nan")
    before = Snapshot(model, optimizer)
    with pytest.raises(UnfitWeightError, match="'2': the optimizer's state holds NaN"):
        dr.factorize(model, 2, optimizer=optimizer)
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_factors_are_balanced_in_every_dtype(dtype: torch.dtype) -> None:
    layer = dr.factorize(nn.Linear(256, 256).to(dtype), 64)
    up, down = layer.up.double(), layer.down.double()
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=2e-2)


def test_an_empty_batch_passes_through_every_form() -> None:
    for form in (LowRank(2), Adapted(2), FullRank()):
        layer = nn.Linear(16, 16)
        dr.apply_plan(layer, {"": form})
        assert layer(torch.empty(0, 16)).shape == (0, 16)


def test_the_root_can_change_form() -> None:
    layer = nn.Linear(16, 16)
    assert dr.factorize(layer, 2) is layer
    assert dr.current_plan(layer) == {"": LowRank(2)}
    assert type(dr.merge(layer)) is nn.Linear


def test_a_module_with_two_parents_changes_once_and_everywhere() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    changes = dr.apply_plan(model, {"b.0": LowRank(2)})
    assert [change.path for change in changes] == ["a"]
    assert model["a"] is model["b"][0]  # type: ignore[index]
    assert dr.current_plan(model) == {"a": LowRank(2)}
    with pytest.raises(ValueError, match=r"'a' and 'b.0' are one weight with two forms"):
        dr.apply_plan(model, {"a": LowRank(3), "b.0": FullRank()})


def test_a_weight_of_zeros_can_still_learn() -> None:
    """Zero-initialized layers end many residual branches: both factors at zero would be dead."""
    layer = nn.Linear(16, 12, bias=False)
    nn.init.zeros_(layer.weight)
    dr.factorize(layer, 4)
    layer(torch.randn(8, 16)).sum().backward()
    assert not layer.weight.any()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_merged_models_are_plain_and_load_anywhere() -> None:
    model = dr.merge(dr.deflate(dr.inflate(dr.factorize(mlp(), 2))))
    assert [type(m) for m in model] == [type(m) for m in mlp()]
    mlp().load_state_dict(model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert dr.merge(model) is model


def test_copies_and_pickles_keep_the_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = dr.deflate(mlp(), 2, layers="*")
    x = torch.randn(3, 16)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(x), model(x))
        assert dr.current_plan(dr.inflate(twin))["0"] == FullRank()
    assert dr.current_plan(model)["0"] == Adapted(2)


def test_adapters_differ_between_layers_and_follow_the_seed_only() -> None:
    def adapters(seed: int) -> list[Tensor]:
        model = mlp()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        dr.deflate(model, 4, layers=["2", "0"])
        assert torch.equal(torch.get_rng_state(), state)
        return [model[0].down, model[2].down]

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][:, :16], first[1][:, :16])


def test_printing_a_model_shows_its_forms() -> None:
    assert "form=LowRank(rank=2, decomposition='svd')" in repr(dr.factorize(mlp(), 2))


@pytest.mark.slow
def test_a_compiled_model_follows_every_change() -> None:
    torch._dynamo.reset()  # what other tests compiled counts towards the limit of recompilations
    model, x = mlp(), torch.randn(4, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for plan in (LowRank(2), FullRank(), Adapted(2), Adapted(2, execution="two-branch")):
        dr.apply_plan(model, {"0": plan, "2": plan})
        assert torch.allclose(compiled(x), model(x))


# One survey a change.


class Surveys:
    """Counts the surveys of a model: each asks once which parents read their children's weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, original = 0, sites.readers

        def counted(model: nn.Module) -> dict[nn.Module, nn.Module]:
            self.count += 1
            return original(model)

        monkeypatch.setattr(sites, "readers", counted)


CHANGES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "apply_plan": lambda m, o: dr.apply_plan(m, {"0": FullRank(), "2": Adapted(3)}, optimizer=o),
    "factorize": lambda m, o: dr.factorize(m, 3, optimizer=o),
    "factorize-map": lambda m, o: dr.factorize(m, {"0": 3, "*": 0.5}, optimizer=o),
    "inflate": lambda m, o: dr.inflate(m, optimizer=o),
    "deflate": lambda m, o: dr.deflate(m, optimizer=o),
    "deflate-low-rank": lambda m, o: dr.deflate(m, 3, to="low-rank", optimizer=o),
    "merge": lambda m, o: dr.merge(m, optimizer=o),
}


@pytest.mark.parametrize("verb", sorted(CHANGES))
def test_a_change_surveys_the_model_once(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(mlp(), 2)
    optimizer = trained(model)
    before, surveys = dr.current_plan(model), Surveys(monkeypatch)
    CHANGES[verb](model, optimizer)
    assert surveys.count == 1
    assert dr.current_plan(model) != before


def test_a_survey_finds_a_shared_module_by_all_its_paths() -> None:
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    found = find_sites(model, dr.survey(model), ["b.0.weight_hh_l0", "c", "c.weight"])
    assert [site.path for site in found.values()] == ["a.weight_hh_l0", "c", "c"]
    with pytest.raises(ValueError, match=r"'b.0' has several weights: name one of 'a.weight_ih"):
        find_sites(model, dr.survey(model), ["b.0"])


def test_a_mapping_of_statistics_is_a_calibration() -> None:
    x = torch.randn(32, 16)
    one, two = mlp(), mlp()
    known = dr.calibrate(one, [x], layers="0")
    dr.factorize(one, 2, layers="0", calibration=known)
    dr.factorize(two, 2, layers="0", calibration={"0": known["0"]})
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), dr.factorize(mlp(), 2)(x))
