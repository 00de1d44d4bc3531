"""What a run with the closed loop records is enough to repeat its decisions, and to check them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from training import Silent

from dynarank import LowRank
from dynarank.schedules import ClosedLoop, decide_again, replay, spectra_from_records
from dynarank.train.data import limit, load_digits_data
from dynarank.train.images import ImageTask
from dynarank.train.loop import Machine
from dynarank.train.recipes import load_recipe
from dynarank.train.run import run_schedule


def test_a_run_folder_tells_what_the_schedule_was_given_and_decided(tmp_path: Path) -> None:
    recipe, silent = load_recipe("digits"), Silent()
    task = ImageTask(recipe, limit(load_digits_data(), 320), seed=0)
    machine = Machine(torch.device("cpu"))
    run_schedule(recipe, "closed-loop", task, tmp_path, silent, seed=0, epochs=5, machine=machine)
    text = (tmp_path / "records.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    spectra = spectra_from_records(lines)
    recorded = replay(lines, LowRank(0.25)).decisions
    changed = [(line["step"], line["path"]) for line in lines if line["kind"] == "change"]
    assert recorded and changed == [(d.step, d.path) for d in recorded]
    loop = cast(ClosedLoop, recipe.schedule("closed-loop"))
    steps = 5 * task.steps_per_epoch
    layers = {path: (reading.full_rank, 1) for path, reading in spectra[0].items()}
    assert tuple(decide_again(loop, layers, steps, spectra)) == recorded
    blunt = replace(loop, saturation=0.99)
    assert tuple(decide_again(blunt, layers, steps, spectra)) != recorded
