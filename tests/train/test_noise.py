"""The noise scale of a run: read, drawn, and without effect on the run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from training import Silent

from dynarank.records import NoiseRecord, Run, read_run
from dynarank.report import write_report
from dynarank.report.figures import write_figures
from dynarank.train.loop import Machine
from dynarank.train.recipes import load_recipe
from dynarank.train.run import run_schedule
from dynarank.train.tasks import make_task

CPU = torch.device("cpu")


def run(folder: Path, *, noise: bool) -> Run:
    recipe = load_recipe("digits")
    task = make_task(recipe, seed=0, device=CPU, train_limit=256, test_limit=60)
    machine = Machine(CPU, noise=noise)
    run_schedule(recipe, "dynamic-rank", task, folder, Silent(), seed=0, epochs=3, machine=machine)
    return read_run(folder)


def test_reading_the_noise_changes_nothing_and_is_drawn(tmp_path: Path) -> None:
    noisy, plain = run(tmp_path / "a", noise=True), run(tmp_path / "b", noise=False)
    found = noisy.all(NoiseRecord)
    assert [record.epoch for record in found] == [1, 2, 3] and not plain.all(NoiseRecord)
    assert all(record.noise_scale > 0 for record in found)
    assert all({"conv1", "conv2", "conv3"} <= set(record.layers) for record in found)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert "Gradient noise" in write_report(tmp_path / "a").read_text()
    assert "Gradient noise" not in write_report(tmp_path / "b").read_text()
    drawn = [path.name for path in write_figures(tmp_path / "a", tmp_path / "figures", ["svg"])]
    assert "noise.svg" in drawn
