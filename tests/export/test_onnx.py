"""ONNX files compute what the model does, for any batch size, or are not written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import dynarank as dr
from dynarank.export.onnx import to_onnx

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular")
        self.fc, self.drop = nn.Linear(32, 16), nn.Dropout(0.5)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.drop(self.conv(image).mean((2, 3)))
        return y if scale is None else y * scale, self.fc(torch.cat((y, y), 1))


def two() -> nn.Module:
    torch.manual_seed(0)
    model = Two()
    dr.factorize(model, 3, layers="conv", decomposition="tucker")
    return dr.factorize(model, 3, layers="fc")


def run(path: Path, **inputs: Tensor) -> list[Tensor]:
    session = ort.InferenceSession(str(path))
    named = {name: value.numpy() for name, value in inputs.items()}
    return [torch.from_numpy(one) for one in session.run(None, named)]


def test_tuples_of_inputs_and_outputs(tmp_path: Path) -> None:
    model, path = two().train(), tmp_path / "two.onnx"
    x, scale = torch.randn(4, 8, 6, 6), torch.randn(4, 16)
    state, before = torch.get_rng_state(), list(model.modules())
    found = to_onnx(model, (x, scale), path)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and list(model.modules()) == before
    assert found.batch_sizes == (4, 5, 1) and found.outputs == ("0", "1")
    assert found.difference < 1e-5 and str(found).startswith(f"{path}: {found.size:,} bytes")
    x, scale = torch.randn(7, 8, 6, 6), torch.randn(7, 16)
    with torch.no_grad():
        expected = model.eval()(x, scale)
    for ours, theirs in zip(run(path, image=x, scale=scale), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_transformers_model_with_a_dict_and_a_dataclass(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config)
    dr.factorize(model, 4, layers="*dense*")
    example = {"input_ids": torch.randint(0, 40, (1, 6)), "attention_mask": torch.ones(1, 6).long()}
    found = to_onnx(model, example, tmp_path / "bert.onnx")
    assert found.outputs == ("logits",) and found.batch_sizes == (2, 3, 1)
    words = torch.randint(0, 40, (5, 6))
    mask = torch.tensor([[1] * 4 + [0] * 2] * 5)
    (logits,) = run(tmp_path / "bert.onnx", input_ids=words, attention_mask=mask)
    with torch.no_grad():
        expected = model.eval()(input_ids=words, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the one before")
    with pytest.raises(ValueError, match=r"model\.onnx computes something else .* nothing is writ"):
        to_onnx(two(), (torch.randn(2, 8, 6, 6),), path, tolerance=0.0)
    assert path.read_text() == "the one before" and list(tmp_path.iterdir()) == [path]


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"mine": self.fc(x) - y}


class Echo(Difference):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"x": x, **super().forward(x, y)}


def test_inputs_have_their_names_in_any_order(tmp_path: Path) -> None:
    model, path = dr.factorize(Difference(), 2, layers="*").eval(), tmp_path / "a.onnx"
    x, y = torch.randn(2, 32), torch.randn(2, 32)
    to_onnx(model, {"y": y, "x": x}, path)
    (found,) = run(path, x=x, y=y)
    torch.testing.assert_close(found, model(x, y)["mine"].detach(), rtol=1e-4, atol=1e-5)


def test_half_precision_and_what_onnx_does_not_run(tmp_path: Path) -> None:
    half = dr.factorize(nn.Sequential(nn.Linear(32, 32)), 2, layers="*")
    path, x = tmp_path / "a.onnx", torch.randn(2, 32)
    assert to_onnx(half.half(), x.half(), path).size == path.stat().st_size
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"onnxruntime does not run this model.* Duplicate"):
        to_onnx(dr.factorize(Echo(), 2, layers="*"), (x, x), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_torch_does_not_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> None:
        raise RuntimeError("\x1b[96mstep 2/3") from ValueError("Cannot view\na tensor")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ValueError, match=r"torch\.onnx cannot .*Cannot view\); a \.pt2"):
        to_onnx(two(), (torch.randn(2, 8, 6, 6),), tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"`{name}`.*pip install 'dynarank\[onnx\]'"):
        to_onnx(two(), torch.randn(2, 8, 6, 6), tmp_path / "a.onnx")


def test_a_model_too_large_for_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dynarank.export.onnx._LIMIT", 1_000)
    with pytest.raises(ValueError, match=r"bytes, and one ONNX file holds at most 1,000"):
        to_onnx(two(), (torch.randn(2, 8, 6, 6),), tmp_path / "a.onnx")
