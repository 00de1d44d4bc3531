"""GPT, BERT and the bidirectional LSTM: what they see, what they cost, what of them is ranked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank.cost.flops import count_flops, trace
from dynarank.train.bert import BERT
from dynarank.train.bilstm import BiLSTM
from dynarank.train.gpt import GPT
from dynarank.train.text_models import MODELS
from dynarank.train.transformer import Block

VOCABULARY, LENGTH = 50, 12


def make(name: str, *, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt":
        return GPT(VOCABULARY, LENGTH, width=16, depth=2, heads=4, dropout=dropout)
    if name == "bert":
        return BERT(VOCABULARY, LENGTH, 3, width=16, depth=2, heads=4, dropout=dropout)
    return BiLSTM(VOCABULARY, 2, width=16, hidden=12, dropout=dropout)


def sample(name: str) -> tuple[Tensor, ...]:
    tokens = torch.randint(1, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    return (tokens, torch.zeros_like(tokens)) if name == "bert" else (tokens,)


LAYERS = {"gpt": "blocks.*", "bert": "blocks.*", "bilstm": "lstm.*"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", [dr.FullRank(), dr.LowRank(4), dr.Adapted(4)])
def test_predicted_and_counted_costs_agree(name: str, form: dr.FullRank) -> None:
    model, batch = make(name), sample(name)
    use = trace(model, batch)
    paths = [path for path in use.layers if path.startswith(LAYERS[name][:-1])]
    assert len(paths) == (4 if name == "bilstm" else 8)
    plan = dict.fromkeys(paths, form)
    dr.apply_plan(model, plan)
    meta = tuple(part.to("meta") for part in batch)
    assert use.flops(plan) == count_flops(model.to("meta"), meta)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert use.parameters(plan) == (trainable, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make(name)
    batch = sample(name)
    if name == "bert":
        batch[1][:, LENGTH // 2 :] = 1
    output = model(*batch)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_only_in_training(name: str) -> None:
    model, batch = make(name, dropout=0.5), sample(name)
    assert not torch.equal(model(*batch), model(*batch))
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


def test_gpt_sees_nothing_of_what_follows() -> None:
    model = make("gpt").double().eval()
    (tokens,) = sample("gpt")
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()  # every later token sees it


def test_gpt_starts_at_chance() -> None:
    model = GPT(256, 32, width=32, depth=3, heads=2)
    tokens = torch.randint(256, (8, 33))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(5.545, abs=0.05)  # ln 256
    last = [model.blocks[0].out.weight, model.blocks[2].down.weight]  # type: ignore[union-attr]
    assert all(w.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1) for w in last)


@pytest.mark.parametrize("name", ["bert", "bilstm"])
def test_padding_changes_nothing_else(name: str) -> None:
    """BERT looks at no padding, however much there is; of the LSTM, no padding is pooled."""
    model = make(name).double().eval()
    tokens = sample(name)[0]
    tokens[:, 8:] = 0
    inputs = (tokens, torch.zeros_like(tokens))[: 2 if name == "bert" else 1]
    if name == "bert":
        shorter = tuple(part[:, :9] for part in inputs)
        torch.testing.assert_close(model(*inputs), model(*shorter), rtol=1e-12, atol=1e-12)
        return
    lstm = model.lstm
    states, _ = lstm(model.embedding(tokens))  # type: ignore[operator]
    pooled = torch.cat([states[:, :8].mean(1), states[:, :8].amax(1)], dim=1)
    torch.testing.assert_close(model(tokens), model.head(pooled), rtol=1e-12, atol=1e-12)  # type: ignore[operator]


def test_an_empty_review_is_judged_by_the_bias() -> None:
    model = make("bilstm").eval()
    output = model(torch.zeros(2, LENGTH, dtype=torch.long))
    assert torch.equal(output, model.head.bias.expand(2, -1))  # type: ignore[union-attr]


def test_segments_count() -> None:
    model = make("bert").eval()
    tokens, segments = sample("bert")
    assert not torch.allclose(model(tokens, segments), model(tokens, 1 - segments))


def test_forget_gates_begin_open() -> None:
    model = make("bilstm")
    for name in ("bias_ih_l0", "bias_ih_l0_reverse"):
        bias = getattr(model.lstm, name)
        assert torch.equal(bias[12:24], torch.ones(12)) and bias[:12].abs().max() < 0.5
    assert not model.embedding.weight[0].any()  # type: ignore[index]


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_a_sequence_too_long_is_refused(name: str) -> None:
    tokens = torch.ones(1, LENGTH + 1, dtype=torch.long)
    inputs = (tokens, torch.zeros_like(tokens))[: 2 if name == "bert" else 1]
    with pytest.raises(ValueError, match="a sequence has at most 12 tokens, got 13"):
        make(name)(*inputs)


def test_a_block_is_what_its_docstring_says() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, dim=-1)
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        weight = (q[..., rows] @ k[..., rows].mT / 2).softmax(-1)
        heads.append(weight @ v[..., rows])
    y = x + block.out(torch.cat(heads, -1))
    wanted = y + block.down(nn.functional.gelu(block.up(block.norm2(y))))
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="heads must divide width, got 3 heads and width 8"):
        Block(8, 3)
