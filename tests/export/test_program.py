"""``.pt2`` files compute what the model does, for any batch size, or are not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import dynarank as dr
from dynarank.export.batch_axis import Batch
from dynarank.export.program import to_pt2


def small(to: str = "low-rank") -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 32)]
    model = nn.Sequential(*layers)
    if to == "adapted":
        return dr.deflate(model, 2, layers="0")
    return dr.factorize(model, 2, layers="0")


def test_a_file_is_as_large_as_its_parameters(tmp_path: Path) -> None:
    data = torch.randn(100_000, 32)
    found = to_pt2(small(), data[:2], tmp_path / "model.pt2")
    assert found.size < 40_000


@pytest.mark.parametrize("to", ["low-rank", "adapted"])
def test_it_computes_what_the_model_does(to: str, tmp_path: Path) -> None:
    model, x = small(to).train(), torch.randn(1, 32)
    state = torch.get_rng_state()
    found = to_pt2(model, x, tmp_path / "model.pt2")
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert int(model[1].num_batches_tracked) == 0
    assert found.outputs == ("output",) and found.batch_sizes == (2, 3, 1)
    x = torch.randn(7, 32)
    with torch.no_grad():
        expected = model.eval()(x)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)


def test_outputs_are_plain_data(tmp_path: Path) -> None:
    """What loads the file has neither the class of the outputs nor that of the cache in them."""
    config = hf.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = dr.factorize(hf.GPT2LMHeadModel(config), 2, layers="*c_fc")
    words = {"input_ids": torch.randint(0, 40, (2, 5))}
    assert to_pt2(model, words, tmp_path / "gpt2.pt2").outputs == ("logits",)
    found = torch.export.load(tmp_path / "gpt2.pt2").module()(**words)
    assert type(found) is dict
    with torch.no_grad():
        expected = model.eval()(**words).logits
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)


def test_the_batch_may_be_in_another_dimension(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    model = dr.factorize(layer, 2, layers="*linear*")
    to_pt2(model, torch.randn(5, 2, 32), tmp_path / "model.pt2", batch_dim=1)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(5, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model.eval()(x), rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class OfFour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(4, 32))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    for model in (Branches(), OfFour()):
        dr.factorize(model, 2, layers="*")
        with pytest.raises(ValueError, match=r"torch\.export cannot export .*batch_dim=None fixes"):
            to_pt2(model, torch.randn(4, 32), path)
    to_pt2(model, torch.randn(4, 32), path, batch_dim=None)
    with pytest.raises(ValueError, match=r"batch_dim=3 is a dimension of .*\(4, 32\)"):
        to_pt2(model, torch.randn(4, 32), path, batch_dim=3)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("the one before")
    real = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda *a: _Off(real(*a)))
    with pytest.raises(ValueError, match=r"output is off by .* nothing is written"):
        to_pt2(small(), torch.randn(2, 32), path)
    assert path.read_text() == "the one before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_file_that_differs_for_some_batch_size(
    size: int, tmp_path: Path, monkeypatch: Any
) -> None:
    real = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda *a: _Off(real(*a), size))
    with pytest.raises(ValueError, match=r"output is off by .* nothing is written"):
        to_pt2(small(), torch.randn(2, 32), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class _Off:
    def __init__(self, program: Any, size: int | None = None) -> None:
        self.program, self.size = program, size

    def module(self) -> Any:
        return lambda x: self.program.module()(x) + 0.1 * (self.size in (None, len(x)))


class Mixed(nn.Module):
    """Inputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor, *, twice: bool = False, n: int = 1) -> Tensor:
        return self.fc(x) - y * (n + twice)


def test_arguments_that_are_no_tensors_and_in_any_order(tmp_path: Path) -> None:
    model = dr.factorize(Mixed(), 2, layers="*")
    example = {"n": 3, "twice": True, "y": torch.randn(2, 32), "x": torch.randn(2, 32)}
    assert to_pt2(model, example, tmp_path / "model.pt2").difference < 1e-5


def test_what_has_no_outputs_or_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives no tensors, but a NoneType"):
        to_pt2(Silent(), torch.randn(2, 32), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="the example has no rows"):
        to_pt2(small(), torch.randn(0, 32), tmp_path / "model.pt2")


class Silent(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, input: Tensor) -> None:  # type: ignore[override]
        super().forward(input)


def test_only_the_batch_grows() -> None:
    example = {"x": torch.randn(2, 3), "other": torch.randn(4), "n": 2}
    grown = Batch(example, 0).of_size(5).example
    assert grown["x"].shape == (5, 3) and grown["other"].shape == (4,) and grown["n"] == 2
    assert torch.equal(grown["x"][2], example["x"][0])
