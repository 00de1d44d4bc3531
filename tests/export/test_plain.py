"""Plain models: the same function, as few parameters, and nothing of dynarank in them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from every_layer import FORMS, KINDS, Kind, Model, in_form
from hypothesis import given, settings
from laws import LAYER_AND_DECOMPOSITION, LayerCase, fitting, randomize
from safetensors.torch import save_file
from torch import Tensor, nn

import dynarank as dr
from dynarank import LowRank
from dynarank.export.same_outputs import allowance, difference
from dynarank.layers import RankedLayer, WeightSpec, effective, register_layer
from dynarank.layers.registry import _RANKED

MERGED = (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def plain_of(model: nn.Module, **options: Any) -> nn.Module:
    """The plain model, whatever it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dr.to_plain(model, **options)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_plain(model: nn.Module, *inputs: Any, tolerance: float = 1e-6, **options: Any) -> None:
    """The plain model computes the same, has nothing of dynarank, and the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    plain = plain_of(model, **options)
    model.eval(), plain.eval()
    with torch.no_grad():
        ours, theirs = model(*inputs), plain(*inputs)
    ours, theirs = (y if isinstance(y, Tensor) else y[0] for y in (ours, theirs))
    assert (ours - theirs).abs().max() <= tolerance * ours.abs().max().clamp(min=1)
    for module in plain.modules():
        assert not isinstance(module, RankedLayer)
        for table in (v for n, v in vars(module).items() if n.endswith("_hooks")):
            assert not table
    assert {id(p) for p in plain.parameters()}.isdisjoint(map(id, model.parameters()))
    now = model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_layer(kind: Kind, form: str) -> None:
    model = in_form(kind.make(), form)
    check_plain(model, *kind.inputs(), keep="factors")
    layer = plain_of(model, keep="factors").layer
    keeps = form == "low-rank" and kind.plain not in MERGED
    assert type(layer) is (nn.Sequential if keeps else kind.plain)
    if keeps:
        assert size(layer) == size(model)


@pytest.mark.parametrize(("case", "decomposition"), LAYER_AND_DECOMPOSITION, ids=str)
def test_every_decomposition(case: LayerCase, decomposition: str) -> None:
    model = nn.Sequential(case.make()).double()
    dr.apply_plan(model, {"0": fitting(model, LowRank(3, decomposition))})
    randomize(model)
    x = torch.randn(case.shape, dtype=torch.float64)
    check_plain(model, x, tolerance=1e-12, keep="factors")
    plain = plain_of(model, keep="factors")
    assert type(plain[0]) is nn.Sequential and size(plain) == size(model)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    sides = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, dilation = draw(sides), draw(sides)
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    same = draw(st.booleans())
    stride = (1,) * dims if same else draw(sides)
    padding = "same" if same else draw(st.tuples(*[st.integers(0, 2)] * dims))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    bias = draw(st.booleans())
    options: Any = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    conv = kind(4, 6, kernel, stride, padding_mode=mode, **options)
    return conv, (2, 4, *[9] * dims)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(["svd", "tucker", "cp", "separable"]))
def test_every_convolution(case: tuple[nn.Module, tuple[int, ...]], decomposition: str) -> None:
    conv, shape = case
    model = nn.Sequential(conv).double()
    dr.apply_plan(model, {"0": fitting(model, LowRank(2, decomposition))})
    check_plain(model, torch.randn(shape, dtype=torch.float64), tolerance=1e-12, keep="factors")


def test_unbatched_circular_padding() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"))
    dr.factorize(model, 2, layers="*")
    check_plain(model, torch.randn(4, 7, 7), keep="factors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = dr.factorize(nn.Sequential(nn.Linear(16, 16)), 2, layers="*").to(dtype)
    plain = dr.to_plain(model)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    x = torch.randn(2, 16, dtype=dtype)
    assert torch.equal(plain(x), model(x))


# How many parameters it has


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def test_a_low_rank_model_keeps_its_number_of_parameters() -> None:
    model = dr.factorize(net(), 8)
    plain = dr.to_plain(model)
    assert size(plain) == size(model) < size(net())
    assert size(model) == 2 * (8 * 128 + 64) + 64 * 4 + 4
    assert list(plain.state_dict())[:3] == ["0.0.weight", "0.1.weight", "0.1.bias"]


def test_the_result_is_never_larger_than_the_merged_model() -> None:
    model = dr.factorize(net(), {"0": 40, "2": 8})
    assert type(dr.to_plain(model)[0]) is nn.Linear
    assert type(dr.to_plain(model)[2]) is nn.Sequential
    assert size(dr.to_plain(model, keep="factors")) == size(model)
    assert size(dr.to_plain(model, keep="merged")) == size(net())


def test_its_state_is_laid_out_as_safetensors_takes_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32))
    dr.factorize(model, 2, layers="*")
    upsample = dr.factorize(nn.Sequential(nn.ConvTranspose2d(16, 16, 3)), 2, layers="*")
    for plain in map(dr.to_plain, (model, upsample)):
        save_file(plain.state_dict(), tmp_path / "plain.safetensors")


def test_layers_says_which_keep_their_factors() -> None:
    plain = dr.to_plain(dr.factorize(net(), 8), layers="2")
    assert [type(plain[i]) for i in (0, 2)] == [nn.Linear, nn.Sequential]
    with pytest.raises(ValueError, match="'9' matches no layer"):
        dr.to_plain(dr.factorize(net(), 8), layers="9")
    with pytest.raises(
        ValueError, match="keep is one of 'cheaper', 'factors', 'merged', got 'all'"
    ):
        dr.to_plain(net(), keep="all")  # type: ignore[arg-type]


def test_what_is_merged_is_told() -> None:
    model = dr.factorize(
        nn.ModuleDict({"a": nn.LSTM(32, 32), "b": nn.Linear(32, 32)}), 2, layers="*"
    )
    with pytest.warns(UserWarning, match=r"a\.weight_ih_l0, a\.weight_hh_l0 \(LSTM has no plain"):
        plain = dr.to_plain(model)
    assert type(plain["a"]) is nn.LSTM and type(plain["b"]) is nn.Sequential


# Ties, references, hooks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(200, 16, padding_idx=0), nn.Linear(16, 200, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.embed(words)))


def test_a_tied_embedding_still_shares_its_large_factor() -> None:
    model = dr.factorize(Tied(), 4, layers="embed")
    with pytest.warns(UserWarning, match="embed and out are one low-rank weight"):
        plain = dr.to_plain(model)
    assert plain.embed[0].weight is plain.out[1].weight
    assert size(plain) == size(model) + 4 * 16
    assert plain.embed[0].padding_idx == 0
    words = torch.randint(0, 200, (2, 5))
    assert torch.equal(plain(words), model(words))


def test_ties_of_weights_that_modules_store_in_another_way_stay() -> None:
    """Transposed convolutions store (in, out), and a Linear after an embedding the transpose."""
    pairs = [nn.ConvTranspose1d(16, 16, 5, padding=2) for _ in range(2)]
    pairs[1].weight = pairs[0].weight
    model = dr.factorize(nn.Sequential(*pairs), 2, layers="0")
    plain = dr.to_plain(model)
    assert size(plain) == size(model) and plain[0][0].weight is plain[1][0].weight
    check_plain(model, torch.randn(2, 16, 7))
    tables = nn.ModuleList([nn.Embedding(100, 16) for _ in range(2)])
    tables[1].weight = tables[0].weight
    plain = dr.to_plain(dr.factorize(tables, 2, layers="0"))
    assert size(plain) == 2 * 116 and plain[0][1].weight is plain[1][1].weight


def test_layers_that_are_one_weight_stay_one() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    model.append(model[0])
    plain = dr.to_plain(dr.factorize(model, 2, layers="0"))
    assert plain[0] is plain[2]
    assert plain[0][1].weight is plain[1][1].weight
    assert size(plain) == size(model)


def test_who_holds_a_layer_holds_its_plain_form() -> None:
    model = dr.factorize(net(), 8)
    model.kept = [model[0]]  # type: ignore[assignment]
    plain = dr.to_plain(model)
    assert plain.kept[0] is plain[0] and plain.kept[0] is not model[0]
    assert plain[0].in_features == 64


def test_hooks_of_the_user_stay_and_those_of_dynarank_go() -> None:
    model, calls = net(), list[str]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = dr.schedules.dynamic_rank(8, inflate=2, deflate=4)
    ranks = dr.RankScheduler(model, optimizer, schedule, 8)
    model.ranks = ranks  # type: ignore[assignment]
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    plain = dr.to_plain(model)
    plain(torch.randn(2, 64))
    assert calls == ["hook"] and plain.ranks is None and model.ranks is ranks
    assert not plain._load_state_dict_pre_hooks and model._load_state_dict_pre_hooks
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    ranks.step()


def test_it_keeps_mode_and_what_is_frozen() -> None:
    model = dr.factorize(net(), 8)
    model[0].down.requires_grad_(False)
    model[2].eval()
    plain = dr.to_plain(model)
    assert [p.requires_grad for p in plain[0].parameters()] == [False, True, True]
    assert plain[0][1].training and not plain[2][0].training


def test_it_trains_what_the_model_trains_also_without_gradients() -> None:
    model = dr.factorize(nn.Sequential(nn.Embedding(200, 16)), 4, layers="0")
    with torch.no_grad():
        plain = dr.to_plain(model)
    assert [p.requires_grad for p in plain.parameters()] == [True, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_root_and_wrappers() -> None:
    layer = dr.factorize(nn.Linear(64, 64), 8, layers="*")
    assert type(dr.to_plain(layer)) is nn.Sequential
    assert type(dr.to_plain(torch.compile(dr.factorize(net(), 8)))) is nn.Sequential
    model = nn.Sequential(torch.compile(dr.factorize(net(), 8)), nn.Linear(4, 4))
    plain = dr.to_plain(model)
    assert type(plain[0]) is nn.Sequential and type(plain[0][0]) is nn.Sequential


def test_an_own_forward_that_a_copy_would_share_is_refused() -> None:
    model = dr.factorize(net(), 8)
    own = model[0].forward
    model[0].forward = lambda x: 2 * own(x)
    with pytest.raises(ValueError, match=r"'0' has its own forward \(<lambda>"):
        dr.to_plain(model)


def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(net(), 8)
    monkeypatch.setattr("dynarank.export.plain.is_dtensor", lambda p: p is model[0].up)
    with pytest.raises(
        ValueError, match=r"0\.up is sharded over several processes: save the model"
    ):
        dr.to_plain(model)


# Modules that read a layer's weight


def encoder(nested: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


def test_an_encoder_keeps_its_factors_in_evaluation() -> None:
    model = dr.factorize(encoder(False), 2, layers="*linear*").eval()
    plain = dr.to_plain(model)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert type(plain.layers[0].linear1) is nn.Sequential and size(plain) == size(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_positions_of_an_encoder_are_told() -> None:
    model = dr.factorize(encoder(True), 2, layers="*linear*").eval()
    with pytest.warns(UserWarning, match="at padded positions are those of training, not zeros"):
        plain = dr.to_plain(model)
    x, padded = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        ours, theirs = (m(x, src_key_padding_mask=padded) for m in (model, plain))
    torch.testing.assert_close(ours[~padded], theirs[~padded], rtol=1e-5, atol=1e-5)


class Reads(nn.Module):
    """As T5 does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.ModuleList([nn.Linear(32, 32)]), how

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x) if self.how == "openly" else self.hidden(x)

    def helped(self, x: Tensor) -> Tensor:
        return self.fc[0](x.to(self.fc[0].weight.dtype))

    def hidden(self, x: Tensor) -> Tensor:
        (layer,) = self.fc
        return layer(x.to(layer.weight.dtype))


class Hidden(Reads):
    def helped(self, x: Tensor) -> Tensor:
        return x


def test_a_weight_that_its_parent_reads_is_merged() -> None:
    model = dr.factorize(Reads("openly"), 2, layers="*")
    with pytest.warns(UserWarning, match=r"fc\.0 \(Reads reads its weight\)"):
        plain = dr.to_plain(model)
    assert type(plain.fc[0]) is nn.Linear
    check_plain(model, torch.randn(2, 32))


class Asks(nn.Module):
    """Does what it does by the class of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)])
        self.inner = nn.ModuleDict({"a": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu() if isinstance(layer, (nn.Conv2d, nn.Linear)) else layer(x)
        return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        deep = isinstance(self.inner["a"], nn.Sequential)
        return self.inner["a"](x).relu() if deep else self.inner["a"](x)


def test_a_layer_whose_class_its_parent_asks_for_is_merged() -> None:
    model = dr.factorize(nn.Sequential(Asks(), nn.Linear(64, 64)), 3, layers="*").eval()
    x = torch.randn(2, 64)
    with pytest.warns(UserWarning, match=r"0\.layers\.0.* \(Asks asks for its class\)"):
        plain = dr.to_plain(model, example=x)
    assert isinstance(plain[0].layers[0], nn.Linear) and isinstance(plain[1], nn.Sequential)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)


class Penalized(nn.Linear):
    def penalty(self) -> Tensor:
        return torch.zeros(())


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = Penalized(32, 32), Penalized(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(x)) + self.fc.penalty() + self.other.in_features


def test_a_layer_whose_method_is_called_is_merged() -> None:
    plain = plain_of(dr.factorize(Calls(), 2, layers="*"))
    assert type(plain.fc) is Penalized and type(plain.other) is nn.Sequential


def test_a_layer_with_hooks_on_its_state_is_merged() -> None:
    model = dr.factorize(net(), 8)
    model[0].register_state_dict_post_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="0 .hooks on its state"):
        assert type(dr.to_plain(model)[0]) is nn.Linear


def test_a_read_that_no_source_tells_is_named_by_the_example() -> None:
    model = dr.factorize(Hidden("hidden"), 2, layers="*")
    with pytest.raises(ValueError, match=r"reads weight of layer 'fc\.0'.*layers="):
        dr.to_plain(model, example=torch.randn(2, 32))
    dr.to_plain(model, layers=lambda module, path: False, example=torch.randn(2, 32))


def test_outputs_are_compared_in_their_dtypes() -> None:
    """Complex parts, infinities of a mask, and numbers beside integers, which allow nothing."""
    one, masked = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("-inf")])
    assert difference(torch.complex(one, one), torch.complex(one, 2 * one))[0] > 0.1
    assert difference(masked, masked + torch.tensor([1e-6, 0]))[0] < 1e-5
    assert difference(masked, one)[0] == difference(one, masked)[0] == float("inf")
    assert allowance((one, one.long(), one > 1)) == allowance(one) == 1e-4
    assert allowance(one.to(torch.complex128)) == 1e-10 and allowance(one.half()) == 5e-2


def test_the_example_finds_the_layer_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(net(), 8)
    x, state = torch.randn(2, 64), torch.get_rng_state()
    dr.to_plain(model, example=x)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    chain = type(model[2]).plain_chain

    def wrong(layer: Any) -> Any:
        made = chain(layer)
        if layer is not model[0]:
            made.append(nn.Tanh())
        return made

    monkeypatch.setattr(type(model[2]), "plain_chain", wrong)
    with pytest.raises(ValueError, match=r"off by .*, first at layer '0'"):
        dr.to_plain(model, example=x)


@pytest.mark.parametrize("one", ARCHITECTURES, ids=str)
def test_every_architecture(one: Architecture) -> None:
    model = dr.factorize(one.build().eval(), 0.3, layers=lambda module, path: True)
    plain = plain_of(model)
    with torch.no_grad():
        ours, theirs = (one.logits(m, one.batch()) for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert size(plain) <= size(plain_of(model, keep="merged"))
    assert not any(isinstance(module, RankedLayer) for module in plain.modules())


# Your own layers


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((32,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.gain = nn.Parameter(torch.full((32,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * nn.functional.linear(x, self.weight)


class RankedGained(RankedLayer, Gained):
    plain = Gained
    weight = effective("weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        return (WeightSpec("weight", (32, 32)),)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.multiply(self.resolved(), x)


def with_chain(layer: Any) -> nn.Sequential:
    factors = [nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False), Gain()]
    factors[0].weight, factors[1].weight = layer.down, layer.up
    factors[2].gain = layer.gain  # type: ignore[assignment]
    return nn.Sequential(*factors)


@pytest.mark.parametrize("chain", [None, with_chain])
def test_a_registered_layer(chain: Callable[..., Any] | None, monkeypatch: Any) -> None:
    register_layer(Gained, RankedGained)
    try:
        model = dr.factorize(nn.Sequential(Gained()), 2, layers="*")
        if chain is not None:
            monkeypatch.setattr(RankedGained, "plain_chain", chain)
        x = torch.randn(3, 32)
        check_plain(model, x, tolerance=1e-5)
        assert type(plain_of(model)[0]) is (Gained if chain is None else nn.Sequential)
    finally:
        del _RANKED[Gained]


def test_a_layer_with_tensors_of_its_own_is_merged() -> None:
    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.register_buffer("count", torch.ones(3))

    model = dr.factorize(nn.Sequential(Counted()), 2, layers="*")
    assert type(plain_of(model)[0]) is Counted


# What people do with it next


LOADS = """
import sys
sys.modules["dynarank"] = None
import torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
for name, layer in model.items():
    y = layer(*inputs[name])
    y = y[0] if isinstance(y, tuple) else y
    assert torch.equal(y, expected[name]), name
"""


def test_it_loads_where_dynarank_cannot_be_imported(tmp_path: Path) -> None:
    kinds = {str(k): k for k in KINDS if k.plain.__module__.startswith("torch.")}
    forms = {name: in_form(kind.make(), "low-rank") for name, kind in kinds.items()}
    model = nn.ModuleDict({name: plain_of(one).layer for name, one in forms.items()})
    inputs = {name: kind.inputs() for name, kind in kinds.items()}
    expected = {name: Model(model[name])(*inputs[name]).detach() for name in kinds}
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    program = [sys.executable, "-c", LOADS, str(tmp_path / "model.pt")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_copies_traces_and_exports() -> None:
    model = dr.to_plain(dr.factorize(net(), 8)).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert copy.deepcopy(model).half()[0][0].weight.dtype is torch.float16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_can_be_quantized() -> None:
    model = dr.to_plain(dr.factorize(net(), 8)).eval()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert "Quantized" in type(small[0][0]).__name__ or "quantized" in type(small[0][0]).__module__


def test_it_trains_on() -> None:
    model = dr.to_plain(dr.factorize(net(), 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0][0].weight.clone()
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0][0].weight)
