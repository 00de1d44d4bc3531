"""``spectrum RUN`` checks the weights of a run by the digest in its records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damage import flipped
from report_runs import write_run
from safetensors.torch import save_file

from dynarank.cli.spectrum import spectrum
from dynarank.files.reading import DamagedFileError, sha256
from dynarank.files.sealed_json import sealed
from dynarank.records import SummaryRecord, read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with weights, and their digest in its summary."""
    folder = write_run(tmp_path)
    save_file({"a.weight": torch.randn(4, 3)}, folder / "model.safetensors")
    (summary,) = read_run(folder).all(SummaryRecord)
    digest = {"model_sha256": sha256(folder / "model.safetensors")}
    records = folder / "records.jsonl"
    *lines, _ = records.read_bytes().splitlines()
    lines.append(sealed(summary.model_copy(update=digest).model_dump_json()).encode())
    records.write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_a_flip_of_any_bit_of_the_weights_is_noticed(run: Path) -> None:
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    spectrum(run, rank=2, no_plot=True)
    for bit in range(0, len(whole) * 8, 5):
        weights.write_bytes(flipped(whole, bit))
        with pytest.raises(DamagedFileError, match=r"model\.safetensors cannot be read: "):
            spectrum(run, rank=2, no_plot=True)


def test_damaged_records_say_nothing_of_the_weights(run: Path) -> None:
    (run / "records.jsonl").write_bytes(b"")
    spectrum(run, rank=2, no_plot=True)


def test_weights_that_are_kept_elsewhere_are_read(run: Path, tmp_path: Path) -> None:
    weights = run / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "store"))
    spectrum(run, rank=2, no_plot=True)
