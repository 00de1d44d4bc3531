"""LSTM, GRU and RNN, layers and cells, in the three forms: the plain module's function, exactly."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from covering import over
from laws import assert_close, randomize
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Form
from dynarank.layers import RankedLayer
from dynarank.layers.recurrent.loop import mirror
from dynarank.surgery.sites import survey

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

IN, HIDDEN = 5, 6
FORMS: list[Form] = [
    LowRank(2, execution="factored"),
    LowRank(2, execution="joined"),
    Adapted(2, execution="merged"),
    Adapted(2, execution="two-branch"),
]
AUTO: list[Form] = [LowRank(2), Adapted(2)]
NETS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(IN, HIDDEN),
    "lstm-deep": lambda: nn.LSTM(IN, HIDDEN, 2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(IN, HIDDEN, 2, bidirectional=True, proj_size=3),
    "lstm-bare": lambda: nn.LSTM(IN, HIDDEN, 2, bias=False),
    "lstm-dropout": lambda: nn.LSTM(IN, HIDDEN, 3, dropout=0.4),
    "gru": lambda: nn.GRU(IN, HIDDEN, batch_first=True),
    "gru-deep": lambda: nn.GRU(IN, HIDDEN, 2, bidirectional=True, dropout=0.3),
    "gru-bare": lambda: nn.GRU(IN, HIDDEN, bias=False, bidirectional=True),
    "rnn": lambda: nn.RNN(IN, HIDDEN, 2, bidirectional=True),
    "rnn-relu": lambda: nn.RNN(IN, HIDDEN, nonlinearity="relu", bias=False),
}
CELLS: dict[str, Any] = {
    "lstm-cell": lambda: nn.LSTMCell(IN, HIDDEN),
    "gru-cell": lambda: nn.GRUCell(IN, HIDDEN, bias=False),
    "rnn-cell": lambda: nn.RNNCell(IN, HIDDEN, nonlinearity="relu"),
}
FEW = ["lstm-deep", "lstm-projected", "gru", "rnn-relu"]
KINDS = ["batched", "states", "packed", "packed-states", "unbatched"]
over_few = pytest.mark.parametrize("net", FEW)
over_forms = pytest.mark.parametrize("form", FORMS, ids=str)
over_auto = pytest.mark.parametrize("form", AUTO, ids=str)


def build(net: str, form: Form | None = None, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    module = {**NETS, **CELLS}[net]().to(dtype)
    if form is not None:
        dr.apply_plan(module, {site.path: form for site in survey(module)})
        randomize(module)
    return module


def plain_of(module: nn.Module) -> Any:
    """The plain module with the effective weights."""
    plain = dr.merge(copy.deepcopy(module))
    assert type(plain).__module__ == "torch.nn.modules.rnn"
    return plain


def inputs(module: Any, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    if kind == "unbatched":
        return (draw(7, IN),)
    lengths = (4, 7, 1) if kind in ("packed", "packed-states") else (7, 7, 7)
    rows = [draw(n, IN) for n in lengths]
    x: Any = torch.stack(rows, 0 if module.batch_first else 1) if lengths[0] == 7 else None
    if x is None:
        x = pack_sequence(rows, enforce_sorted=False)
    if "states" not in kind:
        return (x,)
    count = module.num_layers * (1 + module.bidirectional)
    h = draw(count, 3, module.proj_size or HIDDEN)
    return (x, (h, draw(count, 3, HIDDEN)) if module.mode == "LSTM" else h)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def gradients(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Everything the module returns, and the gradients of everything it was given."""
    torch.manual_seed(5)  # for dropout
    leaves = [t.detach().requires_grad_() for t in tensors(arguments)]
    fresh = iter(leaves)

    def exchange(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return PackedSequence(next(fresh), *value[1:])
        return tuple(map(exchange, value)) if isinstance(value, tuple) else next(fresh)

    outputs = tensors(module(*map(exchange, arguments)))
    sum(((i + y).sin().sum() for i, y in enumerate(outputs)), torch.zeros(())).backward()
    return outputs, [leaf.grad for leaf in leaves]  # type: ignore[misc]


# Law 2: a form computes with its effective weight.


@over({"net": NETS, "form": FORMS, "kind": KINDS})
def test_the_plain_layer_with_the_effective_weights(net: str, form: Form, kind: str) -> None:
    """Values, last states, and the gradients of input, states, biases and factors."""
    module = build(net, form)
    plain = plain_of(module)
    arguments = inputs(module, kind)
    actual, expected = gradients(module, arguments), gradients(plain, arguments)
    for one, two in zip(actual, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    for site in survey(module):
        whole = plain.get_parameter(site.spec.name).grad
        cast_form = site.form
        assert not isinstance(cast_form, FullRank | None)
        pulled = site.spec.decomposition(cast_form).pull(site.factors(), whole)
        scale = cast_form.scale if isinstance(cast_form, Adapted) else 1.0
        for factor, gradient in zip(site.factors(), pulled, strict=True):
            assert factor.grad is not None
            assert_close(factor.grad, gradient * scale, 1e-11)
        base = site.parameters().get(f"{site.spec.name}_base")
        assert base is None or base.grad is None
    for name, p in plain.named_parameters():
        if name.startswith("bias"):
            assert_close(module.get_parameter(name).grad, p.grad)


@over({"net": CELLS, "form": FORMS, "given": [True, False], "batch": [(3,), ()]})
def test_cells(net: str, form: Form, given: bool, batch: tuple[int, ...]) -> None:
    module = build(net, form)
    plain = plain_of(module)
    state = torch.randn(*batch, HIDDEN, dtype=torch.float64)
    hx = (state, state + 1) if "lstm" in net else state
    arguments = (torch.randn(*batch, IN, dtype=torch.float64), *([hx] if given else []))
    actual, expected = gradients(module, arguments), gradients(plain, arguments)
    for one, two in zip(actual, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    x = arguments[0].float()
    module.float()
    assert count_flops(module, x) == trace(module, x).flops({})


@pytest.mark.parametrize("form", [*FORMS, *AUTO], ids=str)
def test_the_same_where_nothing_needs_a_gradient(form: Form) -> None:
    module = build("lstm-dropout", form).eval()
    arguments = inputs(module, "states")
    with torch.no_grad():
        for a, b in zip(
            tensors(module(*arguments)), tensors(plain_of(module)(*arguments)), strict=True
        ):
            assert_close(a, b)


@pytest.mark.parametrize("ranked", ["weight_ih*", "weight_hh_l0", "*_reverse"])
def test_some_matrices_only(ranked: str) -> None:
    module = build("lstm-deep")
    dr.factorize(module, 2, layers=ranked)
    forms = {type(form) for form in module.forms.values()}
    assert forms == {FullRank, LowRank}
    x = inputs(module, "packed")[0]
    assert_close(module(x)[0].data, plain_of(module)(x)[0].data)


def test_a_weight_can_be_read_but_not_written() -> None:
    module = build("lstm", LowRank(2))
    expected = module.weight_ih_l0_up @ module.weight_ih_l0_down
    assert torch.equal(module.weight_ih_l0, expected)
    assert [w.shape for w in module.all_weights[0]] == [
        w.shape for w in nn.LSTM(IN, HIDDEN).all_weights[0]
    ]
    with pytest.raises(KeyError, match="already exists"):
        module.weight_ih_l0 = nn.Parameter(expected.detach())
    with pytest.raises(AttributeError, match="weight_ih_l1"):
        _ = module.weight_ih_l1


def test_wrong_inputs_are_refused() -> None:
    module = build("lstm", LowRank(2))
    x, (h, c) = inputs(module, "states")
    for wrong in (
        (x[..., :4],),
        (x, (h[:, :2], c)),
        (x, (h, c[..., :2])),
        (x[None],),
        (x[0], (h, c)),
    ):
        with pytest.raises(RuntimeError):
            module(*wrong)
    with pytest.raises(ValueError, match="dtype"):
        module(x.float())
    with pytest.raises(RuntimeError, match="hx must be"):
        build("gru-cell", LowRank(2))(x[0], h[0, :2])
    with pytest.raises(RuntimeError, match="input must be"):
        build("gru-cell", LowRank(2))(x)


def test_mirror_reverses_each_sequence() -> None:
    rows = [torch.arange(10.0 * i, 10 * i + n) for i, n in enumerate((2, 5, 1, 5))]
    packed = pack_sequence([r.unsqueeze(1) for r in rows], enforce_sorted=False)
    turned = pack_sequence([r.flip(0).unsqueeze(1) for r in rows], enforce_sorted=False)
    order = mirror(packed.batch_sizes)
    assert torch.equal(packed.data[order], turned.data)
    assert torch.equal(order[order], torch.arange(len(order)))


# Law 3 and 4: changes of form.


@over({"net": FEW, "form": AUTO, "verb": ["inflate", "deflate", "merge"]})
def test_the_function_is_unchanged(net: str, form: Form, verb: str) -> None:
    module = build(net, form).eval()
    arguments = inputs(module, "states")
    expected = tensors(module(*arguments))
    if verb == "deflate":
        dr.deflate(module, 1, layers="*")
    else:
        getattr(dr, verb)(module)
        plain = {**NETS}[net]()
        assert list(module.state_dict()) == list(plain.state_dict())
        flat = [getattr(module, name) for name in module._flat_weights_names]
        assert all(a is b for a, b in zip(module._flat_weights, flat, strict=True))
        assert all(isinstance(w, nn.Parameter) for w in flat)
        module.flatten_parameters()
    if verb == "merge":
        assert type(module) is type(plain)
        assert set(vars(module)) == set(vars(plain))
    for a, b in zip(tensors(module(*arguments)), expected, strict=True):
        assert_close(a, b)


@over_auto
def test_a_plan_applied_twice_is_applied_once(form: Form) -> None:
    module = build("lstm-deep", form)
    before = {name: id(p) for name, p in module.named_parameters()}
    assert dr.apply_plan(module, {site.path: form for site in survey(module)}) == []
    assert {name: id(p) for name, p in module.named_parameters()} == before


@over_auto
def test_old_parameters_are_garbage(form: Form) -> None:
    module = build("gru-deep")
    old = [weakref.ref(site.parameters()[site.spec.name]) for site in survey(module)]
    dr.apply_plan(module, {site.path: form for site in survey(module)})
    module(*inputs(module, "states"))
    gc.collect()
    assert all(ref() is None for ref in old)
    old = [weakref.ref(p) for site in survey(module) for p in site.factors()]
    dr.inflate(module)
    module(*inputs(module, "states"))
    gc.collect()
    assert all(ref() is None for ref in old)


def test_a_failed_change_leaves_everything_as_it_was() -> None:
    module = build("lstm", LowRank(2))
    listed, parameters = list(module._flat_weights), list(module.parameters())
    with torch.no_grad():
        module.weight_hh_l0_up[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        dr.inflate(module)
    assert all(a is b for a, b in zip(module._flat_weights, listed, strict=True))
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@over_auto
@pytest.mark.parametrize("net", ["lstm-deep", "gru"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies(net: str, form: Form, copied: Any) -> None:
    module = build(net, form)
    twin = copied(module)
    x = inputs(module, "batched")[0]
    assert torch.equal(module(x)[0], twin(x)[0])
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in module.parameters())
    dr.inflate(twin)
    assert all(isinstance(p, nn.Parameter) for p in twin._flat_weights)
    assert isinstance(module.forms["weight_ih_l0"], LowRank | Adapted)


@over_auto
def test_state_dict_there_and_back(form: Form) -> None:
    module, other = build("lstm-projected", form), build("lstm-projected", form)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(module.state_dict())
    x = inputs(module, "batched")[0]
    assert torch.equal(module(x)[0], other(x)[0])


@over_auto
def test_moved_to_another_dtype(form: Form) -> None:
    module = build("lstm-deep", form).float()
    assert all(p is None or p.dtype == torch.float32 for p in module._flat_weights)
    x = inputs(module, "batched", torch.float32)[0]
    assert_close(module(x)[0], plain_of(module)(x)[0])
    dr.inflate(module)
    assert module.double()(x.double())[0].dtype == torch.float64


@over_forms
@pytest.mark.parametrize("net", ["lstm-deep", "gru-deep"])
def test_functional_calls_see_their_parameters(net: str, form: Form) -> None:
    module, other = build(net, form).eval(), build(net, form).eval()
    randomize(other, seed=9)
    x = inputs(module, "batched")[0]
    values = {name: p.detach() for name, p in other.named_parameters()}
    called = torch.func.functional_call(module, values, (x,))[0]
    assert_close(called, other(x)[0])


@over_auto
def test_a_shared_module_and_tied_weights(form: Form) -> None:
    first, second = nn.GRU(IN, IN), nn.GRU(IN, IN)
    second.weight_hh_l0 = first.weight_hh_l0
    model = nn.ModuleDict({"a": first, "b": second, "c": first}).double()
    sites = {site.path: site for site in survey(model)}
    assert list(sites) == ["a.weight_ih_l0", "a.weight_hh_l0", "b.weight_ih_l0"]
    dr.apply_plan(model, dict.fromkeys(sites, form))
    randomize(model)
    assert torch.equal(first.weight_hh_l0, second.weight_hh_l0)
    x = torch.randn(4, 2, IN, dtype=torch.float64)
    expected = first(second(x)[0])[0]
    dr.merge(model)
    assert first.weight_hh_l0 is second.weight_hh_l0
    assert_close(first(second(x)[0])[0], expected)


# Law 7: cost.


@pytest.mark.parametrize("net", [*FEW, "lstm-bare"])
@pytest.mark.parametrize("form", [FullRank(), *FORMS, *AUTO], ids=str)
def test_cost_is_exact(net: str, form: Form) -> None:
    module = build(net, dtype=torch.float32)
    x, hx = inputs(module, "states", torch.float32)
    x = x.narrow(int(module.batch_first), 0, 3)  # steps
    for arguments in (
        (x,),
        (x.clone().requires_grad_(), tree_map(torch.Tensor.requires_grad_, hx)),
    ):
        plain = build(net, dtype=torch.float32)
        predicted = trace(plain, arguments)
        plan = {site.path: form for site in survey(plain)}
        dr.apply_plan(plain, plan)
        meta = copy.deepcopy(plain).to("meta")
        moved = tree_map(lambda t: t.detach().to("meta").requires_grad_(t.requires_grad), arguments)
        assert count_flops(meta, moved) == predicted.flops(plan)
        assert predicted.rest.training == 0
        sizes = [(p.numel(), p.requires_grad) for p in plain.parameters()]
        assert predicted.parameters(plan) == (
            sum(n for n, trains in sizes if trains),
            sum(n for n, _ in sizes),
        )


@over_forms
@pytest.mark.parametrize("net", ["gru", "lstm-bare"])
def test_cost_of_packed_sequences(net: str, form: Form) -> None:
    """Counted on the CPU in fp64, where torch runs products that are counted."""
    module = build(net, form)
    (x,) = inputs(module, "packed")
    for state in (None, inputs(module, "packed-states")[1]):
        arguments = (x,) if state is None else (x, state)
        assert count_flops(module, arguments) == trace(module, arguments).flops({})


@pytest.mark.parametrize("frozen", ["weight_hh*", "weight_ih*", "*"])
@over_forms
def test_cost_with_frozen_weights(frozen: str, form: Form) -> None:
    module = build("lstm-projected", form)
    for name, p in module.named_parameters():
        if frozen == "*" or name.startswith(frozen[:-1]):
            p.requires_grad_(False)
    (x,) = inputs(module, "batched")
    assert count_flops(module, x) == trace(module, x).flops({})


def test_the_loop_runs_where_it_saves_enough() -> None:
    """A large recurrent matrix is multiplied by in factors, a small one is joined."""
    taken = {}
    for hidden, device in ((16, "cpu"), (512, "cpu"), (512, "cuda")):
        module = dr.factorize(nn.LSTM(hidden, hidden), 32 if hidden > 32 else 4, layers="*")
        x = torch.randn(2, 32, hidden, requires_grad=True)
        calls = type(module).calls(module, {"input": x})
        for name, (call,) in calls.items():
            moved = type(call)(*call.__dict__.values())
            object.__setattr__(moved, "device", device)
            taken[name, hidden, device] = module.execution(module.resolved(name), moved).name
    assert taken == {
        ("weight_ih_l0", 16, "cpu"): "factored",
        ("weight_hh_l0", 16, "cpu"): "joined",
        ("weight_ih_l0", 512, "cpu"): "factored",
        ("weight_hh_l0", 512, "cpu"): "factored",
        ("weight_ih_l0", 512, "cuda"): "factored",
        ("weight_hh_l0", 512, "cuda"): "joined",
    }


# End to end.


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 16, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, (h, _) = self.lstm(x)
        return self.head(torch.cat((h[-2], h[-1]), -1))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}


@pytest.mark.parametrize(
    ("kind", "ending", "autocast"),
    [
        ("sgd", "adapted", False),
        ("sgd", "low-rank", True),
        ("adamw", "adapted", True),
        ("adamw", "low-rank", False),
    ],
)
def test_a_classifier_through_its_life(kind: str, ending: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    model = Classifier()
    dr.factorize(model, Rank(0.25, of="min"))
    assert "lstm.weight_ih_l1_reverse_down" in dict(model.named_parameters())
    optimizer = OPTIMIZERS[kind](model.parameters())
    tokens, lengths = torch.randint(20, (16, 9)), torch.randint(1, 10, (16,))
    target = tokens[:, 0] % 5

    def train(steps: int) -> float:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=autocast):
                loss = nn.functional.cross_entropy(model(tokens, lengths), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    def logits() -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(tokens, lengths)

    start = train(1)
    train(19)
    before = logits()
    dr.inflate(model, optimizer=optimizer)
    assert_close(logits(), before)
    train(20)
    before = logits()
    changes = dr.deflate(model, to=ending, optimizer=optimizer)
    assert changes is model
    if ending == "adapted":
        assert_close(logits(), before)
    middle = train(20)
    assert middle < 0.8 * start
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    for p, state in optimizer.state.items():
        assert all(v.shape == p.shape for n, v in state.items() if n != "step" and v is not None)
    before = logits()
    dr.merge(model, optimizer=optimizer)
    assert not any(isinstance(module, RankedLayer) for module in model.modules())
    assert type(model.lstm) is nn.LSTM
    assert_close(logits(), before)
    assert train(5) < 0.8 * start


def test_moments_move_with_the_weights() -> None:
    """Deflating exactly: the moments of the factors are those of the weight, pulled back."""
    module = build("lstm-deep", LowRank(3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    x = inputs(module, "batched")[0]
    module(x)[0].square().mean().backward()
    optimizer.step()
    (site, *_) = survey(module)
    form, factors = site.form, site.factors()
    before = [optimizer.state[f]["momentum_buffer"].clone() for f in factors]
    dr.inflate(module, optimizer=optimizer)
    moment = optimizer.state[module.weight_ih_l0]["momentum_buffer"]
    pulled = site.spec.decomposition(form).pull(factors, moment)  # type: ignore[arg-type]
    for actual, expected in zip(pulled, before, strict=True):
        assert_close(actual, expected, 1e-9)


@over_forms
@pytest.mark.parametrize("net", ["lstm-deep", "gru"])
def test_bf16_autocast(net: str, form: Form) -> None:
    """Packed, because oneDNN's LSTM, which is used if not, has no bf16 on every machine."""
    module = build(net, form, torch.float32)
    plain = plain_of(module)
    x = inputs(module, "packed", torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = module(x)[0].data, plain(x)[0].data
    actual.sum().backward()
    assert_close(actual.float(), expected.float(), 3e-2)
    assert_close(actual.float(), plain(x)[0].data, 3e-2)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@over_auto
def test_compiled_like_the_plain_layer(form: Form) -> None:
    module = build("lstm-deep", form)
    model = nn.Sequential(module)
    compiled = torch.compile(model, backend="eager")
    x = inputs(module, "batched")[0]
    assert_close(compiled(x)[0], model(x)[0])
    dr.inflate(model)
    assert_close(compiled(x)[0], model(x)[0])
