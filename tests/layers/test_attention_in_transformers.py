"""torch's Transformer modules with ranked layers inside: train, eval, fast path, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import assert_close, randomize
from plain_twin import compare, plain_twin
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Form
from dynarank.layers.attention import RankedMultiheadAttention

D, N, L, S = 12, 3, 4, 5
FORMS = [FullRank(), LowRank(3), LowRank(3, execution="joined"), Adapted(3), Adapted(9)]
over_forms = pytest.mark.parametrize("form", FORMS, ids=str)
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True",
    "ignore:The PyTorch API of nested tensors",
    "ignore:.*autograd.function.Function.*should not be instantiated",  # by torch.compile
)


def in_form(model: nn.Module, form: Form) -> nn.Module:
    model = model.double()
    dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form))
    randomize(model)
    return model


def encoder(dropout: float = 0.1, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 20, dropout, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def padding() -> Tensor:
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    return mask


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each layer that took torch's fast path, whether its input was nested."""
    taken: list[bool] = []
    original = torch._transformer_encoder_layer_fwd

    def spy(src: Tensor, *rest: Any) -> Tensor:
        taken.append(src.is_nested)
        return original(src, *rest)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    return taken


@over_forms
@pytest.mark.parametrize("masked", ["", "padding", "causal"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder(form: Form, masked: str, norm_first: bool, fast: list[bool]) -> None:
    """The fast path is taken where it would be for plain layers, nested inputs included."""
    model = in_form(encoder(norm_first=norm_first), form)
    plain, x = plain_twin(model), torch.randn(N, S, D, dtype=torch.float64)
    named: dict[str, Any] = {"src_key_padding_mask": padding()} if masked == "padding" else {}
    if masked == "causal":
        mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=x.dtype)
        named = {"mask": mask, "is_causal": True}
    compare(model, plain, (x,), **named)  # in training, with dropout
    compare(model.eval(), plain.eval(), (x,), **named)
    assert fast == []
    with torch.no_grad():
        expected = plain(x, **named)
        wanted = list(fast)
        assert_close(model(x, **named), expected)
    assert fast == wanted * 2
    assert wanted == [masked == "padding" and not norm_first] * 2


@over_forms
def test_a_fast_layer_of_frozen_weights_with_gradients_on(form: Form, fast: list[bool]) -> None:
    model = in_form(encoder(), form).eval().requires_grad_(False)
    plain, x = plain_twin(model).requires_grad_(False), torch.randn(N, S, D, dtype=torch.float64)
    assert_close(model(x), plain(x))
    assert fast == [False] * 4


@over_forms
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder(form: Form, batch_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(D, 3, 20, 0.1, batch_first=batch_first)
    model = in_form(nn.TransformerDecoder(layer, 2), form)
    plain = plain_twin(model)
    x, memory = torch.randn(L, N, D).double(), torch.randn(S, N, D).double()
    if batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=x.dtype)
    named = {
        "tgt_mask": mask,
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.zeros(N, S).double().masked_fill(padding(), -torch.inf),
    }
    compare(model, plain, (x, memory), **named)
    compare(model.eval(), plain.eval(), (x, memory), **named)
    with torch.no_grad():
        assert_close(model(x, memory, **named), plain(x, memory, **named))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cost_is_exact(form: Form) -> None:
    model = nn.Transformer(D, 2, 1, 1, 20, dropout=0.0)
    sample = (torch.empty(S, N, D), torch.empty(L, N, D))
    use = trace(model, sample)
    plan = dict.fromkeys(dr.current_plan(model), form)
    assert len(plan) == 2 + 2 + 2 * 2 + 2
    dr.apply_plan(model, plan)
    predicted = use.flops(plan)
    assert count_flops(model.to("meta"), tuple(x.to("meta") for x in sample)) == predicted


@pytest.mark.parametrize(
    ("form", "need_weights"), [(LowRank(3), True), (Adapted(9), False)], ids=str
)
def test_compiled_in_one_graph(form: Form, need_weights: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(D, 3, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
            x = x + self.attn(x, x, x, key_padding_mask=padding(), need_weights=False)[0]
            return self.attn(x, y, y, need_weights=need_weights)

    model = in_form(Layer(), form)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, N, S, D, dtype=torch.float64).unbind()
    compare(compiled, model, x)


class Copy(nn.Module):
    """A small sequence model: says the source backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, D)
        self.inner = nn.Transformer(D, 2, 1, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(D, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).double()
        source, target = self.table(source), self.table(target)
        return self.head(self.inner(source, target, tgt_mask=mask, tgt_is_causal=True))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        source = torch.randint(1, 11, (16, S), generator=generator)
        wanted = source.flip(1)
        given = torch.cat([torch.zeros(16, 1, dtype=torch.long), wanted[:, :-1]], 1)
        loss = nn.functional.cross_entropy(model(source, given).transpose(1, 2), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("ending", ["adapted", "low-rank"])
def test_end_to_end(kind: str, ending: str) -> None:
    """Factorize, train, inflate, train, deflate, train, merge; the optimizer goes with it."""
    torch.manual_seed(0)
    model = Copy().double()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    dr.factorize(model, Rank(0.25, of="min"))
    forms = dr.current_plan(model)
    assert forms["inner.decoder.layers.1.multihead_attn.in_proj_weight"] == LowRank(3)
    assert sum(isinstance(m, RankedMultiheadAttention) for m in model.modules()) == 5
    assert forms["table"] == FullRank() and all(
        form == LowRank(max(D // 4, 1)) for path, form in forms.items() if path.startswith("inner")
    )
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = train(model, optimizer, 20)
    sample = torch.randint(1, 11, (4, S)), torch.randint(1, 11, (4, L))

    before = model(*sample)
    dr.inflate(model, optimizer=optimizer)
    assert_close(model(*sample), before)
    assert list(model.state_dict()) == keys
    losses += train(model, optimizer, 20)

    before = model(*sample)
    dr.deflate(model, to=ending, optimizer=optimizer)  # type: ignore[arg-type]
    if ending == "adapted":
        assert_close(model(*sample), before)
    losses += train(model, optimizer, 20)

    before = model(*sample)
    dr.merge(model, optimizer=optimizer)
    assert_close(model(*sample), before)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    losses += train(model, optimizer, 5)
    assert losses[-1] < 0.97 * losses[0]
    Copy().double().load_state_dict(model.state_dict())
