"""A checkpoint that an earlier version wrote is read by every later one.

``python tests/checkpoint/test_golden.py FOLDER`` writes one; those in ``tests/data`` are never
written again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("checkpoint-*"))
STEPS, SAVED = 9, 7
ADAPTED = Adapted(2, alpha=8.0)


def built() -> dict[str, Any]:
    """A run as it is before its first step, its weights from a fixed rule."""
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p).mul(0.7).sin() / p.shape[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    schedule = dr.schedules.Phases([0, 2, 4], [LowRank(3, "tucker"), FullRank(), Adapted(2)])
    ranks = dr.RankScheduler(model, optimizer, schedule, STEPS, layers=["0"])
    return {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "ranks": ranks}


def batch(step: int) -> torch.Tensor:
    return torch.arange(4 * 2 * 16).view(4, 2, 4, 4).double().mul(0.3 + step).cos()


def train(run: dict[str, Any], start: int, stop: int) -> list[float]:
    losses: list[float] = []
    for step in range(start, stop):
        loss = run["model"](batch(step)).square().mean()
        loss.backward()
        for part in ("optimizer", "lr_scheduler", "ranks"):
            run[part].step()
        run["optimizer"].zero_grad()
        losses.append(loss.item())
    return losses


def write(folder: Path) -> None:
    run = built()
    dr.apply_plan(run["model"], {"3": ADAPTED}, optimizer=run["optimizer"])
    train(run, 0, SAVED)
    torch.manual_seed(7)
    dr.save(folder, **run, extra={"step": SAVED, "order": torch.arange(3)})
    losses, drawn = train(run, SAVED, STEPS), torch.rand(2).tolist()
    expected = {"losses": losses, "drawn": drawn}
    folder.with_suffix(".json").write_text(json.dumps(expected, indent=2) + "\n", "utf-8")


@pytest.mark.parametrize("golden", [p for p in GOLDEN if p.is_dir()], ids=lambda path: path.name)
def test_it_is_read_and_the_run_goes_on(golden: Path, tmp_path: Path) -> None:
    expected = json.loads(golden.with_suffix(".json").read_text("utf-8"))
    folder = shutil.copytree(golden, tmp_path / "checkpoint")
    run = built()
    extra = dr.load(folder, **run)
    assert extra["step"] == SAVED and extra["order"].tolist() == [0, 1, 2]
    assert run["model"][3].form == ADAPTED and run["model"][0].form == Adapted(2)
    assert torch.rand(2).tolist() == expected["drawn"]
    assert train(run, SAVED, STEPS) == pytest.approx(expected["losses"], rel=1e-9)
    dr.check(**run)


def test_there_is_one() -> None:
    assert any(path.is_dir() for path in GOLDEN)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
