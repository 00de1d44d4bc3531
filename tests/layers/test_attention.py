"""nn.MultiheadAttention in the three forms: equal to the plain one with the effective weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from covering import over
from laws import ALL_FORMS, DTYPES, assert_close, randomize
from plain_twin import compare, plain_twin
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Form
from dynarank.layers.attention import RankedMultiheadAttention
from dynarank.surgery.sites import survey

D, HEADS, N, L, S = 12, 3, 2, 4, 5
over_forms = pytest.mark.parametrize("form", ALL_FORMS, ids=str)
over_changed_forms = pytest.mark.parametrize("form", ALL_FORMS[1:], ids=str)


class Model(nn.Module):
    """Attention inside a model, as it always is; its inputs: one, two or three different ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(**{"embed_dim": D, "num_heads": HEADS, **options})

    def forward(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return self.attn(*spread(inputs), **options)


def spread(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: (x,) is self-attention, (x, y) has y for key and value."""
    return (*inputs, *[inputs[-1]] * (3 - len(inputs)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Case:
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[int, ...] = (D,)
    masks: str = ""
    batched: bool = True
    need_weights: bool = False
    average: bool = True

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> Model:
        torch.manual_seed(0)
        return Model(**dict(self.options)).to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        lengths = [S] if len(self.sizes) == 1 else [L, S, S]
        found = []
        for length, size in zip(lengths, self.sizes, strict=False):
            first = dict(self.options).get("batch_first", False)
            shape = (N, length, size) if first else (length, N, size)
            shape = shape if self.batched else (length, size)
            found.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        return tuple(found)

    def named(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Options of the call."""
        target, batch = S if len(self.sizes) == 1 else L, N if self.batched else 1
        named: dict[str, Any] = {
            "need_weights": self.need_weights,
            "average_attn_weights": self.average,
        }
        later = torch.ones(target, S, dtype=torch.bool).triu(2)
        if "2d" in self.masks:
            named["attn_mask"] = later
        if "3d" in self.masks:
            named["attn_mask"] = torch.stack([later.roll(i, 1) for i in range(batch * HEADS)])
        if "causal" in self.masks:
            named["attn_mask"] = torch.ones(target, S, dtype=torch.bool).triu(1)
            named["is_causal"] = True
        if "padding" in self.masks:
            padding = torch.zeros(batch, S, dtype=torch.bool)
            padding[-1, -1:] = True
            named["key_padding_mask"] = padding if self.batched else padding[0]
        if "float" in self.masks:
            for name in ("attn_mask", "key_padding_mask"):
                if name in named:
                    generator = torch.Generator().manual_seed(4)
                    noise = torch.randn(named[name].shape, generator=generator).to(dtype)
                    named[name] = noise.masked_fill(named[name], -torch.inf)
        return named


def _cases() -> list[Case]:
    shapes = {"self": (D,), "cross": (D, D), "three": (D, D, D)}
    found = [
        Case(f"{kind}-{masks or 'open'}-{'weights' if need else 'fused'}", sizes=sizes,
             masks=masks, need_weights=need)
        for (kind, sizes), masks, need in itertools.product(
            shapes.items(),
            ["", "2d", "3d", "padding", "2d padding", "3d float padding", "causal"],
            [False, True],
        )
    ]  # fmt: skip
    bias_kv = (("add_bias_kv", True), ("add_zero_attn", True))
    separate = (("kdim", 7), ("vdim", 9))
    for need in (False, True):
        more = {
            "causal-padding": Case("", masks="causal padding"),
            "batch-first": Case("", (("batch_first", True),), (D, D), "2d padding"),
            "batch-first-self": Case("", (("batch_first", True),), masks="padding"),
            "unbatched": Case("", batched=False, masks="2d padding"),
            "unbatched-cross": Case("", (("batch_first", True),), (D, D), "3d", batched=False),
            "separate": Case("", separate, (D, 7, 9), "2d float"),
            "separate-batch-first": Case(
                "", (*separate, ("batch_first", True)), (D, 7, 9), "padding"
            ),
            "separate-no-bias": Case("", (*separate, ("bias", False)), (D, 7, 9)),
            "no-bias": Case("", (("bias", False),), (D, D)),
            "bias-kv": Case("", (*bias_kv, *separate), (D, 7, 9), "2d padding"),
            "bias-kv-self": Case("", bias_kv, masks="3d float padding"),
            "zero-attn": Case("", (("add_zero_attn", True),), masks="causal"),
            "dropout": Case("", (("dropout", 0.4),), (D, D), "2d"),
            "dropout-batch-first": Case("", (("dropout", 0.4), ("batch_first", True))),
            "even-heads": Case("", (("num_heads", 2), ("batch_first", True)), masks="padding"),
        }
        for name, case in more.items():
            name = f"{name}-{'weights' if need else 'fused'}"
            found.append(replace(case, name=name, need_weights=need))
    found.append(Case("each-head", need_weights=True, average=False))
    found.append(Case("each-head-unbatched", batched=False, need_weights=True, average=False))
    return found


CASES = _cases()
FEW = [c for c in CASES if c.name in ("self-open-fused", "cross-2d-weights", "separate-fused")]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_few = pytest.mark.parametrize("case", FEW, ids=str)


def in_form(case: Case, form: Form, dtype: torch.dtype = torch.float64) -> Model:
    model = case.model(dtype)
    dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form))
    randomize(model)
    return model


# Law 2: a form computes with its effective weight.


@over_cases
@pytest.mark.parametrize(
    "form",
    [
        LowRank(3, execution="factored"),
        LowRank(3, execution="joined"),
        Adapted(3, execution="merged"),
        Adapted(3, alpha=3.0, execution="two-branch"),
    ],
    ids=str,
)
def test_equal_to_the_plain_layer(case: Case, form: Form) -> None:
    model = in_form(case, form)
    assert type(model.attn) is RankedMultiheadAttention
    compare(model, plain_twin(model), case.inputs(), **case.named())


@over_cases
def test_equal_without_gradients_where_the_plain_layer_is_fused(case: Case) -> None:
    model = in_form(case, LowRank(3)).eval()
    plain = plain_twin(model)
    with torch.no_grad():
        mine = model(*case.inputs(), **case.named())
        theirs = plain(*case.inputs(), **case.named())
    assert_close(mine[0], theirs[0])
    assert (mine[1] is None) == (theirs[1] is None)
    if mine[1] is not None:
        assert_close(mine[1], theirs[1])


@over_few
@over_changed_forms
def test_gradients_of_factors_are_those_of_autograd(case: Case, form: Form) -> None:
    """The chain rule through the effective weight, which autograd does by itself."""
    model = in_form(case, form)
    model(*case.inputs(), **case.named())[0].square().sum().backward()
    plain = plain_twin(model)
    plain(*case.inputs(), **case.named())[0].square().sum().backward()
    wanted = dict(plain.named_parameters())
    for site in survey(model):
        own = [p for p in site.parameters().values() if p.requires_grad]
        name = f"{site.module_paths[0]}.{site.spec.name}"
        expected = torch.autograd.grad(site.effective(), own, wanted[name].grad)
        for p, grad in zip(own, expected, strict=True):
            assert_close(p.grad, grad)


IN, OUT = "attn.in_proj_weight", "attn.out_proj"


@pytest.mark.parametrize(
    "mixed", [{IN: LowRank(3)}, {OUT: LowRank(3)}, {IN: Adapted(2), OUT: LowRank(3)}], ids=str
)
def test_weights_may_have_different_forms(mixed: dict[str, Form]) -> None:
    model = CASES[0].model()
    dr.apply_plan(model, mixed)
    randomize(model)
    compare(model, plain_twin(model), CASES[0].inputs())


def test_two_of_three_separate_weights_in_form() -> None:
    case = FEW[-1]
    model = case.model()
    dr.apply_plan(model, {"attn.q_proj_weight": LowRank(2), "attn.v_proj_weight": Adapted(2)})
    randomize(model)
    assert model.attn.in_proj_weight is None
    assert isinstance(model.attn.k_proj_weight, nn.Parameter)
    compare(model, plain_twin(model), case.inputs(), **case.named())


def test_query_and_key_that_are_one_tensor_share_the_first_factor() -> None:
    """As in DETR, where only query and key carry positions."""
    model = in_form(CASES[0], LowRank(3, execution="factored"))
    x, y = torch.randn(2, S, N, D, dtype=torch.float64).unbind()
    plain = plain_twin(model)
    assert_close(model(x, x, y)[0], plain(x, x, y)[0])
    use = trace(model, (x, x, y)).layers["attn.in_proj_weight"]
    assert [call.rows for call in use.calls] == [(0, 2 * D), (2 * D, 3 * D)]


def test_wrong_arguments_are_refused_as_by_the_plain_layer() -> None:
    model = in_form(CASES[0], LowRank(3))
    x = torch.randn(S, N, D, dtype=torch.float64)
    for named in (
        {"attn_mask": torch.zeros(S, S + 1, dtype=torch.bool)},
        {"attn_mask": torch.zeros(1, S, S)},
        {"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)},
        {"is_causal": True, "need_weights": False},
    ):
        with pytest.raises(ValueError, match="mask"):
            model(x, **named)
        with pytest.raises((RuntimeError, AssertionError)):
            plain_twin(model)(x, **named)
    with pytest.raises(ValueError, match="dimensions"):
        model(x, x[0], x[0])


# Laws 3 and 4.


@over({"case": FEW, "form": ALL_FORMS, "verb": ["inflate", "deflate", "merge"], "dtype": DTYPES})
def test_the_function_is_unchanged(case: Case, form: Form, verb: str, dtype: torch.dtype) -> None:
    model = in_form(case, form, dtype)
    expected = model(*case.inputs(dtype), **case.named(dtype))[0]
    if verb == "inflate":
        dr.inflate(model, layers="*")
    elif verb == "deflate":
        dr.deflate(model, 2, layers="*")
    else:
        dr.merge(model)
        assert type(model.attn) is nn.MultiheadAttention
        assert vars(model.attn).keys() == vars(case.model().attn).keys()
        assert type(model.attn.out_proj) is type(case.model().attn.out_proj)
    assert_close(model(*case.inputs(dtype), **case.named(dtype))[0], expected)


@over_few
@over_forms
def test_a_plan_applied_twice_is_applied_once(case: Case, form: Form) -> None:
    model = in_form(case, form)
    before = {name: id(p) for name, p in model.named_parameters()}
    assert dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form)) == []
    assert {name: id(p) for name, p in model.named_parameters()} == before


@over_few
def test_a_full_rank_layer_has_the_keys_of_its_plain_one(case: Case) -> None:
    model = case.model()
    keys = list(model.state_dict())
    dr.inflate(dr.factorize(model, 2))
    assert list(model.state_dict()) == keys
    case.model().load_state_dict(model.state_dict())


def test_an_output_projection_alone_makes_its_attention_ranked_and_nothing_else() -> None:
    model = CASES[0].model()
    dr.factorize(model, 2, layers="*.out_proj")
    assert type(model.attn) is RankedMultiheadAttention
    changed = dr.current_plan(dr.inflate(model))
    assert changed == {"attn.in_proj_weight": FullRank(), "attn.out_proj": FullRank()}
    dr.deflate(model, 2)
    assert dr.current_plan(model) == {
        "attn.in_proj_weight": FullRank(),
        "attn.out_proj": Adapted(2),
    }


def test_a_failed_change_leaves_the_attention_plain() -> None:
    model = CASES[0].model()
    optimizer = torch.optim.SGD([model.attn.in_proj_weight], lr=0.1)
    with pytest.raises(ValueError, match="optimizer"):
        dr.apply_plan(model, {"attn.out_proj": LowRank(2)}, optimizer=optimizer)
    assert type(model.attn) is nn.MultiheadAttention
    assert "forms" not in vars(model.attn)


# Law 5: the optimizer through changes.


@over_few
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_through_changes(case: Case, kind: str) -> None:
    model = case.model()
    keys = list(model.state_dict())
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
    }[kind]()
    plan = dr.current_plan(model)
    for form in (LowRank(3), FullRank(), Adapted(2), FullRank(), LowRank(2)):
        before = model(*case.inputs(), **case.named())[0].detach()
        dr.apply_plan(model, dict.fromkeys(plan, form), optimizer=optimizer)
        if not isinstance(form, LowRank):
            assert_close(model(*case.inputs(), **case.named())[0], before)
        if isinstance(form, FullRank):
            assert list(model.state_dict()) == keys
        for _ in range(2):
            optimizer.zero_grad()
            model(*case.inputs(), **case.named())[0].square().mean().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}


# Copies, files, other dtypes, compiled.


@over_few
@over_forms
def test_copies_and_files(case: Case, form: Form) -> None:
    model = in_form(case, form)
    expected = model(*case.inputs(), **case.named())[0]
    loaded = in_form(case, form)
    dr.apply_plan(loaded, dr.current_plan(model))
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other.attn) is type(model.attn)
        assert torch.equal(other(*case.inputs(), **case.named())[0], expected)


@over_few
@over_changed_forms
def test_bf16_autocast(case: Case, form: Form) -> None:
    model = in_form(case, form, torch.float32)
    inputs, named = case.inputs(torch.float32), case.named(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = model(*inputs, **named)[0], plain_twin(model)(*inputs, **named)[0]
    assert mine.dtype == theirs.dtype
    assert_close(mine.float(), theirs.float(), 0.1)
    mine.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_printing_and_resetting() -> None:
    for form in (LowRank(3), Adapted(3)):
        model = in_form(CASES[0], form)
        assert "in_proj_weight=" in repr(model) and type(form).__name__ in repr(model)
        with torch.no_grad():
            for p in model.attn.parameters(recurse=False):
                p.zero_()
        model.attn._reset_parameters()
        weight = model.attn.in_proj_weight
        bound = (6 / (4 * D)) ** 0.5
        assert weight.std() > 0.2 * bound
        if isinstance(form, Adapted):
            assert weight.abs().max() <= bound
        assert not model.attn.in_proj_bias.any()
    state = model.attn.__getstate__()
    del state["_qkv_same_embed_dim"]
    model.attn.__setstate__(state)
    assert model.attn._qkv_same_embed_dim is True


# Law 7: cost.


COSTED = [
    c
    for c in CASES
    if c.name.startswith(("bias-kv", "unbatched-cross", "batch-first-self"))
    or c.name.endswith(("open-fused", "open-weights", "2d-fused"))
]


@pytest.mark.parametrize("case", [*COSTED, *FEW[1:]], ids=str)
@pytest.mark.parametrize(
    "form", [FullRank(), LowRank(3), LowRank(6, recompute=True), Adapted(3)], ids=str
)
def test_cost_is_exact(case: Case, form: Form) -> None:
    model = case.model(torch.float32)
    sample = Call(case)
    use = trace(Wrapped(model, sample), case.inputs(torch.float32))
    plan = {f"model.{path}": form for path in dr.current_plan(model)}
    dr.apply_plan(model, {path.removeprefix("model."): f for path, f in plan.items()})
    meta = copy.deepcopy(Wrapped(model, sample)).to("meta")
    inputs = tuple(x.to("meta") for x in case.inputs(torch.float32))
    assert count_flops(meta, inputs) == use.flops(plan)
    assert use.rest.forward > 0


@dataclass(frozen=True)
class Call:
    """A case's options of the call, on the device of the inputs."""

    case: Case

    def on(self, device: torch.device) -> dict[str, Any]:
        named = self.case.named(torch.float32)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()}


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs, **self.call.on(inputs[0].device))


@over(
    {
        "now": [FullRank(), LowRank(2), Adapted(4)],
        "frozen": ["", "in_proj", "out_proj", "in_proj bias"],
        "first": [True, False],
    }
)
def test_cost_does_not_depend_on_the_form_it_was_traced_in(
    now: Form, frozen: str, first: bool
) -> None:
    for form in (LowRank(3, execution="joined"), Adapted(2, execution="merged")):
        model = FEW[0].model(torch.float32)
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in frozen.split()))
        x = torch.empty(S, N, D, device="meta").requires_grad_(not first)
        plan = dict.fromkeys(dr.current_plan(model), now)
        dr.apply_plan(model, plan)
        predicted = trace(model, x).flops(dict.fromkeys(plan, form))
        dr.apply_plan(model, dict.fromkeys(plan, form))
        assert count_flops(copy.deepcopy(model).to("meta"), x) == predicted
