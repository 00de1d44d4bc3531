"""The model card: a header that Hugging Face reads, and every layer with its rank."""

from __future__ import annotations

import json
import warnings

import torch
from torch import nn

import dynarank as dr
from dynarank.export.model_card import model_card


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 16, 32)]
    net = nn.Sequential(*layers, nn.LSTM(32, 32))
    dr.factorize(net, {"0": 3, "2": 4}, decomposition="svd")
    return dr.factorize(net, 2, layers="3.weight_hh_l0")


def page(**options: object) -> str:
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = dr.to_plain(net)
    return model_card(net, plain, **options)  # type: ignore[arg-type]


def test_every_layer_is_listed() -> None:
    net, text = model(), page()
    assert "| `0` | 32x4x3x3 | low-rank | svd | 3 | 1,152 | 204 |" in text
    assert "| `2` | 32x512 | low-rank | svd | 4 | 16,384 | 2,176 |" in text
    assert "| `3.weight_ih_l0` | 128x32 | full-rank |  |  | 4,096 | 4,096 |" in text
    assert "| `3.weight_hh_l0` | 128x32 | low-rank, merged |  |  | 4,096 | 4,096 |" in text
    here = sum(p.numel() for p in net.parameters()) + 4096 - 2 * (128 + 32)
    whole = sum(p.numel() for p in dr.merge(model()).parameters())
    assert f"{here:,} parameters, {here / whole:.3f} of the {whole:,} at full rank." in text


def test_flops_are_those_of_one_example() -> None:
    net = dr.factorize(nn.Sequential(nn.Linear(64, 32)), 4, layers="0")
    text = model_card(net, dr.to_plain(net), example=torch.randn(5, 64))
    flops = 2 * 4 * (64 + 32)
    assert f"{flops:,} FLOPs in a forward pass of one example of (64,), 0.188 of" in text
    assert "FLOPs" not in model_card(net, dr.to_plain(net))


def test_the_header_is_yaml_whatever_is_in_it() -> None:
    text = page(tags=["a: b", 'say "x"'], metrics=["f1"], name="two\nlines", about={"A|B": "c\nd"})
    _, header, body = text.split("---\n", 2)
    lines = header.splitlines()
    assert lines[:2] == ["library_name: pytorch", "tags:"]
    values = [json.loads(line.removeprefix("- ")) for line in lines if line.startswith("- ")]
    assert values == ["dynarank", "low-rank", "a: b", 'say "x"', "f1"]
    assert "\n# two lines\n" in body and "- A|B: c d\n" in body and "license" not in header


def test_code_is_shown_only_if_given() -> None:
    assert "```python\nimport torch\n```" in page(load="import torch\n")
    assert "```" not in page()
