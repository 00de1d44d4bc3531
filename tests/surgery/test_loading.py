"""Loading a state brings the model to the forms that the state has, and its optimizers with it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from every_layer import KINDS, Kind, in_form
from hypothesis import given, settings
from small_run import assert_same_bits, net, snapshot, train_step
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form
from dynarank.layers import RankedLayer
from dynarank.layers.form_entry import KEY
from dynarank.surgery.loading import follow_loads

State = Mapping[str, Tensor]


def through_torch(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: State) -> State:
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


# Ways of a state to another model; the metadata is lost in the last three.
WAYS: dict[str, Callable[[State], State]] = {
    "direct": lambda state: state,
    "torch": through_torch,
    "safetensors": through_safetensors,
    "bf16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "mean": lambda state: {key: (value + value) / 2 for key, value in state.items()},
}
LOSSLESS = [way for way in WAYS if way != "bf16"]


def shake(model: nn.Module, seed: int = 3) -> None:
    """No parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)


def assert_taken(one: nn.Module, other: nn.Module) -> None:
    """Forms, state and its order are alike."""
    assert dr.current_plan(one) == dr.current_plan(other)
    assert_same_bits(dict(one.state_dict()), dict(other.state_dict()))


# A state makes a model what the saved one was.


def mixed() -> nn.Sequential:
    torch.manual_seed(1)
    parts = [nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 5)]
    return nn.Sequential(*parts)


FORMS = st.one_of(
    st.just(FullRank()),
    st.builds(LowRank, st.integers(1, 4), st.sampled_from(["svd", "tucker"])),
    st.builds(
        Adapted,
        st.integers(1, 4),
        st.sampled_from(["svd", "tucker"]),
        st.sampled_from([0.5, 16.0]),
        restart=st.integers(0, 12),
    ),
    st.builds(LowRank, st.just(2), execution=st.just("joined"), recompute=st.booleans()),
)
PLANS = st.fixed_dictionaries({}, optional={"0": FORMS, "2": FORMS, "3": FORMS})


@settings(deadline=None, max_examples=10)
@given(PLANS, PLANS, PLANS, st.sampled_from(LOSSLESS))
def test_any_model_becomes_the_saved_one(
    before: dict[str, Form], plan: dict[str, Form], other: dict[str, Form], way: str
) -> None:
    saved, model, x = mixed(), mixed(), torch.randn(3, 4, 4, 4)
    for one in (before, plan):
        dr.apply_plan(saved, one)
        shake(saved)
    dr.apply_plan(model, other)
    follow_loads(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(x).sum().backward()
    optimizer.step()
    state = saved.state_dict()
    ranked = any(isinstance(module, RankedLayer) for module in saved.modules())
    ours = KEY in str(state.keys()) or (ranked and way in ("direct", "torch"))
    if not ours:  # a checkpoint without any factors is somebody's plain one
        dr.inflate(model, layers="*", optimizer=optimizer)
    model.load_state_dict(WAYS[way](state))
    assert_taken(model, saved)
    assert torch.equal(model(x), saved(x))
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= held


@pytest.mark.parametrize("decomposition", ["svd", "tucker"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_layer_takes_every_form(kind: Kind, decomposition: str) -> None:
    inputs = kind.inputs()
    forms = (LowRank(2, decomposition), Adapted(1, decomposition, alpha=3.0), FullRank())
    for form in forms:
        saved, model = kind.make(), kind.make()
        paths = [site.path for site in dr.survey(saved) if site.form is not None]
        for each in (forms[0], form):
            dr.apply_plan(saved, dict.fromkeys(paths, each))
        shake(saved)
        follow_loads(model)
        for start in (None, *forms):
            if start is not None:
                dr.apply_plan(model, dict.fromkeys(paths, start))
            model.load_state_dict(copy.deepcopy(saved.state_dict()))
            assert_taken(model, saved)
            assert torch.equal(model(*inputs), saved(*inputs))


def test_what_a_later_change_looks_up_travels_too() -> None:
    saved, model = net(), dr.factorize(net(), 1)
    dr.deflate(dr.inflate(dr.factorize(saved, 2)), 3, layers="0", alpha=2.0)
    for p in saved[0].up, saved[2].weight:
        p.requires_grad_(False)
    model.load_state_dict(saved.state_dict())
    assert model[2].last_factored_forms == saved[2].last_factored_forms == {"weight": LowRank(2)}
    assert model[0].factor_norms == saved[0].factor_norms
    assert model[0].up.requires_grad and saved[0].frozen_factors == {"weight": {"up"}}
    plain = net()
    follow_loads(plain)
    dr.inflate(saved)
    plain.load_state_dict(saved.state_dict())
    assert dr.deflate(plain, layers="2")[2].form == Adapted(2)


class Around(nn.Module):
    """A module that has the model as a child, as a LightningModule has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.head, self.model = nn.Linear(3, 2), model


@pytest.mark.parametrize("way", LOSSLESS)
def test_a_model_inside_another_module_follows(way: str) -> None:
    saved, model = Around(dr.factorize(net(), 2)), Around(dr.deflate(net(), 1))
    shake(saved)
    model.load_state_dict(WAYS[way](saved.state_dict()))
    assert_taken(model, saved)
    dr.inflate(saved.model)
    model.load_state_dict(saved.state_dict())  # the metadata of a part tells
    assert_taken(model, saved)


def test_a_model_that_is_one_layer_follows() -> None:
    saved, plain = dr.factorize(nn.Linear(12, 12), 2), nn.Linear(12, 12)
    follow_loads(plain)
    plain.load_state_dict(saved.state_dict())
    assert_taken(plain, saved)
    back = dr.deflate(nn.Linear(12, 12), 1)
    back.load_state_dict(saved.state_dict())
    assert_taken(back, saved)
    back.load_state_dict(dr.inflate(saved).state_dict())
    assert_taken(back, saved)


class Tied(nn.Module):
    """An embedding and a head of one weight, and a layer under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight
        self.mix = self.again = nn.Linear(12, 12)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.mix(self.embed(words)))))


@pytest.mark.parametrize("dedupe", [False, True])
def test_tied_weights_and_shared_modules_stay_one(dedupe: bool) -> None:
    saved, model, words = Tied(), Tied(), torch.arange(5)
    dr.apply_plan(saved, {"embed": LowRank(2), "mix": Adapted(2, alpha=1.0)})
    shake(saved)
    dr.apply_plan(model, {"embed": Adapted(3)})
    state = dict(saved.state_dict())
    if dedupe:  # as safetensors.torch.save_model leaves shared tensors out
        state = {k: v for k, v in state.items() if k.endswith(KEY) or k[:4] not in ("head", "agai")}
    model.load_state_dict(state, strict=not dedupe)
    assert_taken(model, saved)
    assert model.head.up is model.embed.up and model.again is model.mix
    assert torch.equal(model(words), saved(words))


def test_safetensors_load_model_takes_a_tied_model_that_has_the_forms_of_the_file(
    tmp_path: Path,
) -> None:
    """It expects the names from before the load: a lenient load of the file brings the forms."""
    saved, model, words = Tied(), Tied(), torch.arange(5)
    dr.apply_plan(saved, {"embed": Adapted(2, alpha=1.0)})
    shake(saved)
    safetensors.torch.save_model(saved, str(file := tmp_path / "model.safetensors"))
    dr.apply_plan(model, {})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "\w+\.base"'):
        safetensors.torch.load_model(model, file)
    model = Tied()
    dr.apply_plan(model, {})
    model.load_state_dict(safetensors.torch.load_file(file), strict=False)
    assert safetensors.torch.load_model(model, file) == (set(), [])
    assert_taken(model, saved)
    assert model.head.up is model.embed.up and torch.equal(model(words), saved(words))


def test_tied_weights_of_two_forms_are_refused() -> None:
    apart, model = Tied(), dr.factorize(Tied(), 2, layers="embed")
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    dr.factorize(apart, 2, layers="head")
    with nothing_changed(model), pytest.raises(ValueError, match="'embed' and 'head' are one weig"):
        model.load_state_dict(apart.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    saved, model = dr.factorize(net().float(), 2), dr.deflate(net().to(dtype), 1)
    model.load_state_dict(saved.state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model[0].up, saved[0].up.to(dtype))


def test_adapters_of_another_dtype_than_their_base_keep_it() -> None:
    saved, model = dr.deflate(net().bfloat16(), 2), net().bfloat16()
    for layer in (saved[0], saved[2]):
        layer.down, layer.up = (nn.Parameter(p.detach().float()) for p in (layer.down, layer.up))
    shake(saved)
    follow_loads(model)
    model.load_state_dict(saved.state_dict())
    assert_taken(model, saved)


@pytest.mark.parametrize("meta", [False, True])
def test_assign_takes_the_tensors_of_the_state(meta: bool) -> None:
    saved = dr.factorize(net(), 2)
    model = dr.deflate(net(), 1)
    state = saved.state_dict()
    (model.to("meta") if meta else model).load_state_dict(state, assign=True)
    assert_taken(model, saved)
    assert model[0].up.data_ptr() == state["0.up"].data_ptr()


# Where only a part is loaded.


def test_a_layer_alone_refuses_another_form_and_takes_another_alpha() -> None:
    saved, model = dr.deflate(net(), 2, alpha=4.0), dr.deflate(net(), 2)
    shake(saved)
    model[0].load_state_dict(saved[0].state_dict())
    assert model[0].form == saved[0].form and torch.equal(model[0].weight, saved[0].weight)
    other = dr.deflate(net(), 3)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="into the whole model"):
            other[0].load_state_dict(saved[0].state_dict(), strict=strict)
    dr.inflate(saved)
    with pytest.raises(RuntimeError, match="has weight: it was saved in another form"):
        other[0].load_state_dict(saved[0].state_dict())


def test_the_same_shapes_in_another_form_are_refused_by_a_layer_alone() -> None:
    saved, other = dr.deflate(net(), 2), dr.factorize(net(), 2)
    state = saved[0].state_dict()
    del state["base"]
    with pytest.raises(RuntimeError, match="its weight has the form LowRank"):
        other[0].load_state_dict(state, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_weight_changes_no_form(strict: bool) -> None:
    saved, model = dr.deflate(net(), 2), dr.factorize(net(), 1)
    part = {key: value for key, value in saved.state_dict().items() if not key.endswith("up")}
    now = dr.current_plan(model)
    with pytest.raises(RuntimeError, match="another form"):
        model.load_state_dict(part, strict=strict)
    assert dr.current_plan(model) == now


def test_some_layers_of_a_state_are_loaded() -> None:
    saved, model = dr.deflate(net(), 2, alpha=2.0), dr.factorize(net(), 1)
    part = {key: value for key, value in saved.state_dict().items() if key.startswith("2.")}
    model.load_state_dict(part, strict=False)
    assert model[2].form == saved[2].form and model[0].form == LowRank(1)


# States without the entry: of other writers.


def without_entries(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith(KEY)}


@pytest.mark.parametrize("decomposition", ["tucker", "separable"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_names_and_shapes_tell_the_form(kind: Kind, decomposition: str) -> None:
    saved, model = kind.make(), kind.make()
    paths = [site.path for site in dr.survey(saved) if site.form is not None]
    dr.apply_plan(saved, dict.fromkeys(paths, LowRank(3, decomposition)))
    for start in (FullRank(), LowRank(1), LowRank(2, decomposition), Adapted(3, decomposition)):
        dr.apply_plan(model, dict.fromkeys(paths, start))
        model.load_state_dict(without_entries(saved.state_dict()))
        assert torch.equal(model(*kind.inputs()), saved(*kind.inputs()))


def test_an_adapters_alpha_is_that_of_the_layer_or_refused() -> None:
    saved = dr.deflate(net(), 2, alpha=4.0)
    shake(saved)
    state = without_entries(saved.state_dict())
    was = dr.inflate(dr.deflate(net(), 1, alpha=4.0))
    for model in (dr.deflate(net(), 3, alpha=4.0), was):
        model.load_state_dict(state)
        assert dr.current_plan(model) == dr.current_plan(saved)
        assert torch.equal(model[0].weight, saved[0].weight)
    for model in (dr.inflate(dr.factorize(net(), 1)), dr.factorize(net(), 2)):
        with nothing_changed(model), pytest.raises(ValueError, match="nothing says its alpha"):
            model.load_state_dict(state)


# Plain checkpoints.


def test_a_plain_checkpoint_is_refactored_and_said_so() -> None:
    plain, model = net(), dr.factorize(net(), 2)
    shake(plain)
    dr.apply_plan(model, {"4": Adapted(1)})
    with pytest.warns(UserWarning, match=r"up to 0\.\d+ \(at '[02]'\): 0, 2, 4\. To load them"):
        model.load_state_dict(through_safetensors(plain.state_dict()))
    want = dr.factorize(copy.deepcopy(plain), 2)
    assert model[0].form == LowRank(2) and model[4].form == Adapted(1)
    assert torch.allclose(model[0].weight, want[0].weight)
    assert torch.equal(model[4].weight, plain[4].weight)
    assert torch.equal(model[0].bias, plain[0].bias)


def test_a_full_rank_state_of_ours_makes_the_model_full_rank() -> None:
    saved, model = dr.inflate(dr.factorize(net(), 2)), dr.deflate(net(), 2)
    model.load_state_dict(through_torch(saved.state_dict()))
    assert_taken(model, saved)
    part = dr.factorize(dr.deflate(net(), 2), 2, layers="0")
    dr.inflate(part, layers="0")  # the other layer's entry tells
    model.load_state_dict(through_safetensors(part.state_dict()))
    assert_taken(model, part)


def test_a_full_rank_state_of_ours_without_its_metadata_is_told_the_ways_to_load_it() -> None:
    """Either way that the warning names gives what was saved, bit by bit."""
    runs: list[Any] = []
    for _ in range(3):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = dr.schedules.dynamic_rank(2, inflate=2, deflate=4)
        runs.append((model, optimizer, dr.RankScheduler(model, optimizer, schedule, 6)))
    (saved, optimizer, ranks), (early, *_), (late, _, resumed) = runs
    for step in range(3):
        train_step(saved, optimizer, step)
        ranks.step()
    state = through_safetensors(saved.state_dict())
    assert not any(KEY in key for key in state) and dr.current_plan(saved)["0"] == FullRank()
    dr.inflate(early)
    early.load_state_dict(state)
    with pytest.warns(
        UserWarning, match=r"were truncated .*safetensors.* dr\.inflate\(model\) firs"
    ):
        late.load_state_dict(state)
    assert not torch.equal(late[0].weight, saved[0].weight)
    resumed.load_state_dict(ranks.state_dict())
    for model in (early, late):
        assert_taken(model, saved)


def test_a_full_rank_state_of_ours_is_a_plain_one() -> None:
    saved, plain = dr.inflate(dr.factorize(net(), 2)), net()
    assert list(saved.state_dict()) == list(plain.state_dict())
    for way in LOSSLESS:
        plain.load_state_dict(WAYS[way](saved.state_dict()), strict=True)


def test_a_plain_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model = dr.factorize(net(), 2)
    state = through_safetensors(net().state_dict())
    state["2.weight"][0, 0] = torch.nan
    with nothing_changed(model), pytest.raises(ValueError, match="layer '2'"):
        model.load_state_dict(state)


# All or nothing.


class nothing_changed:
    """The model and its objects are the same afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters())

    def __enter__(self) -> None:
        self.before = snapshot(self.model, self.optimizer), dr.current_plan(self.model)

    def __exit__(self, *_: object) -> None:
        assert (snapshot(self.model, self.optimizer), dr.current_plan(self.model)) == self.before


def entry(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


GOOD = '"form":"low-rank","rank":2,"decomposition":"svd","execution":"auto","recompute":false'
HOSTILE = {
    "no bytes": torch.tensor([1000, 2]),
    "negative": torch.tensor([-3]),
    "not a number": torch.tensor([torch.nan]),
    "a matrix": torch.zeros(2, 2),
    "empty": torch.zeros(0),
    "no JSON": entry("weight"),
    "a list": entry("[1]"),
    "deep": entry("[" * 100_000),
    "large": torch.full((1 << 21,), 32),
    "not UTF-8": torch.tensor([255, 254]),
    "rank 0": entry('{"weight":{' + GOOD.replace("2", "0") + "}}"),
    "huge rank": entry('{"weight":{' + GOOD.replace("2", "9" * 30) + "}}"),
    "huge integer": entry('{"weight":{' + GOOD.replace("2", "9" * 9999) + "}}"),
    "rank above the limit": entry('{"weight":{' + GOOD.replace("2", "7") + "}}"),
    "rank of other shapes": entry('{"weight":{' + GOOD.replace("2", "3") + "}}"),
    "share": entry('{"weight":{' + GOOD.replace("2", "0.5") + "}}"),
    "true": entry('{"weight":{' + GOOD.replace("2", "true") + "}}"),
    "decomposition": entry('{"weight":{' + GOOD.replace("svd", "os.system") + "}}"),
    "field": entry('{"weight":{' + GOOD + ',"x":1}}'),
    "norms": entry('{"weight":{' + GOOD + ',"norms":["nan"]}}'),
    "last": entry('{"weight":{' + GOOD + ',"last":{"form":"full-rank"}}}'),
    "recompute": entry('{"weight":{' + GOOD.replace("false", "[]") + "}}"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_entry_is_one_error_and_changes_nothing(what: str) -> None:
    saved, model = dr.factorize(net(), 2), dr.deflate(net(), 2)
    state = {**saved.state_dict(), f"2.{KEY}": HOSTILE[what]}
    with nothing_changed(model), pytest.raises(ValueError, match="layer '2'"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"layer '': (it|its)|above the limit|unknown decomp"):
        saved[2].load_state_dict({**saved[2].state_dict(), KEY: HOSTILE[what]})


@pytest.mark.parametrize("note", [1, "x", [1], {"0": 1}, {"0": "["}, {"0": '{"weight":1}'}])
def test_damaged_metadata_is_an_error(note: Any) -> None:
    saved, model = dr.inflate(dr.factorize(net(), 2)), dr.deflate(net(), 2)
    state: Any = saved.state_dict()
    state._metadata[""][KEY] = note
    with nothing_changed(model), pytest.raises(ValueError, match="does not say of which forms"):
        model.load_state_dict(state)


def test_the_state_of_a_wider_model_is_refused() -> None:
    wide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    model = dr.deflate(net(), 2)
    with nothing_changed(model), pytest.raises(ValueError, match="state of another model"):
        model.load_state_dict(dr.factorize(wide, 2).state_dict())


def test_a_layer_that_cannot_change_says_why() -> None:
    saved, model = dr.factorize(net(), 2), net()
    nn.utils.parametrizations.weight_norm(model[0])
    dr.factorize(model, 2, layers="2")
    with nothing_changed(model), pytest.raises(ValueError, match=r"'0' is LowRank.*cannot take"):
        model.load_state_dict(saved.state_dict(), strict=False)


def test_gradient_hooks_are_not_lost() -> None:
    saved, model = dr.factorize(net(), 2), dr.factorize(net(), 1)
    model[0].up.register_hook(lambda grad: None)
    with nothing_changed(model), pytest.raises(ValueError, match="gradient hooks"):
        model.load_state_dict(saved.state_dict())


# Optimizers.


def moving(state: dict[Any, Any], parameters: list[Tensor]) -> list[Tensor]:
    return [state[p]["exp_avg"] for p in parameters if p in state]


def test_optimizers_that_nobody_named_hold_the_new_parameters() -> None:
    saved, model = dr.factorize(net(), 2), dr.deflate(net(), 1)
    first = [p for p in model[0].parameters() if p.requires_grad]
    rest = [p for p in model[2:].parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(first), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
    stale = torch.optim.SGD(rest, lr=0.1)
    for optimizer in optimizers:
        train_step(model, optimizer, 0)
    bias, momentum = model[4].bias, optimizers[1].state[model[4].bias]
    model.load_state_dict(saved.state_dict())
    assert optimizers[1].state[bias] is momentum and model[4].bias is bias
    for optimizer in (*optimizers, stale):
        train_step(model, optimizer, 1)
    for optimizer, part in zip(optimizers, (model[0], model[2:]), strict=True):
        (group,) = optimizer.param_groups
        assert list(map(id, group["params"])) == list(map(id, part.parameters()))


def test_states_that_fit_are_kept() -> None:
    """So an optimizer may be loaded before the model."""
    saved, model = net(), dr.factorize(net(), 3)
    dr.factorize(saved, 2)
    made = [torch.optim.AdamW(one.parameters()) for one in (saved, model)]
    train_step(saved, made[0], 0)
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
    model.load_state_dict(saved.state_dict())
    assert_same_bits(made[1].state_dict()["state"], made[0].state_dict()["state"])
    for one, optimizer in zip((saved, model), made, strict=True):
        train_step(one, optimizer, 1)
    assert_taken(model, saved)


def test_states_that_do_not_fit_are_dropped() -> None:
    saved, model = dr.factorize(net(), 2), dr.factorize(net(), 1)
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, 0)
    model.load_state_dict(saved.state_dict())
    assert [p in optimizer.state for p in (model[0].up, model[0].bias)] == [False, True]
    train_step(model, optimizer, 1)


def test_a_layer_that_is_spread_over_optimizers_is_refused() -> None:
    saved, model = dr.factorize(net(), 2), dr.factorize(net(), 1)
    ups = [torch.optim.SGD([model[0].up]), torch.optim.SGD([model[0].down, model[0].bias])]
    with nothing_changed(model), pytest.raises(ValueError, match="several optimizers"):
        model.load_state_dict(saved.state_dict())
    assert len(ups[0].param_groups[0]["params"]) == 1


def test_a_wrapped_model_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    saved, model = dr.factorize(net(), 2), dr.factorize(net(), 1)
    wrapper = FullyShardedDataParallel(model)
    with nothing_changed(model), pytest.raises(ValueError, match="wrapped by FullyShardedDataPar"):
        wrapper.load_state_dict(FullyShardedDataParallel(saved).state_dict())
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))


# The hook.


def hooks(model: nn.Module) -> int:
    return sum(len(module._load_state_dict_pre_hooks) for module in model.modules())


def test_a_model_has_one_hook_and_so_have_its_copies() -> None:
    dynamic_rank = dr.schedules.dynamic_rank
    model = dr.inflate(dr.factorize(dr.deflate(net(), 2), 1))
    ranks = dr.RankScheduler(model, torch.optim.SGD(model.parameters()), dynamic_rank(2), 9)
    assert hooks(model) == 1
    saved = dr.deflate(net(), 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks(dr.factorize(other, 1)) == 1
        before = dr.current_plan(model)
        other.load_state_dict(saved.state_dict())
        assert_taken(other, saved)
        assert dr.current_plan(model) == before
    ranks.close()


def test_nothing_is_left_of_it_on_a_merged_model() -> None:
    model = dr.factorize(net(), 2)
    dr.factorize(model[:2], 1)
    assert hooks(model) == 1
    assert hooks(dr.merge(model)) == 0
    assert b"dynarank" not in pickle.dumps(model)


def test_a_failed_change_leaves_no_hook() -> None:
    model = net()
    with pytest.raises(ValueError, match="above the limit"):
        dr.factorize(model, 100, layers="*")
    assert hooks(model) == 0


def test_a_scheduler_that_begins_at_full_rank_follows() -> None:
    model, saved = net(), dr.factorize(net(), 2)
    schedule = dr.schedules.Phases([0, 3], [FullRank(), LowRank(2)])
    dr.RankScheduler(model, torch.optim.SGD(model.parameters()), schedule, 5, layers=["0", "2"])
    model.load_state_dict(saved.state_dict())
    assert_taken(model, saved)


# The state itself.


def test_other_ways_of_using_a_state_go_on() -> None:
    model, x = dr.deflate(net(), 2), torch.randn(2, 6, dtype=torch.float64)
    shake(model)
    state = model.state_dict()
    assert torch.equal(torch.func.functional_call(model, dict(state), x), model(x))
    assert set(state) - {name for name, _ in model.named_parameters()} == {f"0.{KEY}", f"2.{KEY}"}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.load_state_dict(averaged.state_dict())
    lengths = {len(value) for key, value in state.items() if key.endswith(KEY)}
    for step in range(3):
        dr.apply_plan(model, {"0": Adapted(2, restart=step)})
        shake(model)
        lengths.add(len(model.state_dict()[f"0.{KEY}"]))
    assert len(lengths) == 1  # what loads in place finds a tensor of the same size


def test_torchs_checkpoint_functions_take_it() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    saved, model = dr.deflate(net(), 2, alpha=3.0), dr.factorize(net(), 2)
    set_model_state_dict(model, get_model_state_dict(saved))
    assert_taken(model, saved)


def test_a_subclass_that_saves_more_is_still_handled() -> None:
    model = nn.Sequential(Noted(12, 12))
    dr.factorize(model, 2)
    state = model.state_dict()
    assert state["0.note"].item() == 7 and f"0.{KEY}" in state


class Noted(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}note"] = torch.tensor(7)


@pytest.mark.parametrize("form", ["low-rank", "inflated", "adapted"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_state_loads_onto_itself(kind: Kind, form: str) -> None:
    model = in_form(kind.make(), form)
    before = OrderedDict(copy.deepcopy(model.state_dict()))
    parameters = [id(p) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
    assert [id(p) for p in model.parameters()] == parameters
    assert_same_bits(dict(model.state_dict()), dict(before))
