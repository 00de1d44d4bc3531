"""Files of weights hold what the plain model has, bit by bit, or are not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank.export import weights
from dynarank.export.batch_axis import Batch


def off_by_a_bit(write: Callable[..., None], key: str, place: int) -> Callable[..., None]:
    """Write states one of whose tensors is another in its last bit."""

    def wrong(*args: Any) -> None:
        state = dict(args[place])
        state[key] = torch.nextafter(state[key], torch.tensor(torch.inf))
        write(*args[:place], state, *args[place + 1 :])

    return wrong


@pytest.mark.parametrize("batch", [None, Batch(torch.randn(2, 64), 0)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_other_weights_is_not_written(
    suffix: str, batch: Batch | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dr.to_plain(dr.factorize(nn.Sequential(nn.Linear(64, 64)), 8, layers="0"))
    path = tmp_path / f"model{suffix}"
    path.write_text("the one before")
    save = off_by_a_bit(weights.save_tensors, "0.1.bias", 1)
    monkeypatch.setattr(weights, "save_tensors", save)
    monkeypatch.setattr(torch, "save", off_by_a_bit(torch.save, "0.1.bias", 0))
    with pytest.raises(ValueError, match=r"not written rightly: its 0\.1\.bias is another"):
        weights.write_weights(plain, path, batch)
    assert path.read_text() == "the one before" and list(tmp_path.iterdir()) == [path]
