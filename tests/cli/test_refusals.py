"""Everything that is asked is checked before the first step, and a refusal leaves nothing behind.

Each wrong request is one that a later schedule, cell, seed or result would stumble over.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from command_line import call

from dynarank.cli.sweep import _place, parse_epochs  # pyright: ignore[reportPrivateUsage]
from dynarank.files.ownership import owned

SHORT = ["--epochs", "2", "--train-limit", "128"]
COMMANDS = {
    "train": ["train", "digits", *SHORT, "--schedule", "full-rank,low-rank,decay"],
    "compare": ["compare", "digits", *SHORT, "--schedules", "full-rank,low-rank,decay"],
    "sweep": ["sweep", "digits", *SHORT, "--inflate", "5", "--deflate", "20,25"],
    "probe": ["probe", "digits", "--train-limit", "640"],
    "plan": ["plan", "digits", "--schedule", "low-rank"],
}
WRONG = {
    "decomposition": (["--decomposition", "svdd"], "unknown decomposition 'svdd'"),
    "rank": (["--rank", "1000"], "above the limit"),
    "learning-rate": (["--lr", "-1"], "'learning_rate'"),
    "infinite-rate": (["--lr", "inf"], "finite"),
    "meta": (["--device", "meta"], "device 'meta' cannot be used"),
    "endless": (["--epochs", "1" + "0" * 20], "--epochs"),
    "large-seed": (["--seed", "1" + "0" * 20], "--seed"),
    "many-seeds": (["--seeds", "1000000000000"], "--seeds"),
    "many-cells": (["--inflate", "0:1000000000000:1"], "at most 1,000 epochs"),
    "no-rank": (["--rank", ""], "neither a rank"),
    "batch-size": (["--batch-size", "0"], "--batch-size"),
    "large-batch": (["--batch-size", "4096"], "4,?096"),
    "key": (["--set", "learning_rat=1"], "did you mean 'learning_rate'"),
    "no-value": (["--set", "warmup"], "key=value"),
    "value": (["--set", "optimizer=sdg"], "'sdg'"),
    "type": (["--set", "momentum=true"], "momentum"),
    "twice": (["--set", "momentum=0.1", "--set", "momentum=0.2"], "given twice"),
    "both": (["--lr", "0.1", "--set", "learning_rate=0.2"], "either --lr or --set"),
    "model": (["--set", "model=bert"], "."),
    "other-network": (
        ["--set", "model=mlp", "--set", "layers=['*']"],
        "model 'mlp' on data 'digits' raised RuntimeError",
    ),
    "layers": (["--set", "layers=['nothing.*']"], "nothing"),
    "budget": (["--budget", "0.01"], "budget|nearest possible|smallest ranks"),
    "negative-budget": (["--budget", "-1"], "'budget'"),
    "large-budget": (["--budget", "7"], "budget"),
    "device": (["--device", "warp"], "device 'warp'"),
    "precision": (["--precision", "fp23"], "did you mean 'fp32'"),
    "data": (["--data", "nowhere"], "."),
    "out-in-a-file": (["--out", "a-file/x"], "pass another folder with --out"),
    "out-is-a-file": (["--out", "a-file"], "another"),
    "out-owned": (["--out", "owned"], "in use by process"),
    "out-with-files": (["--out", "full"], "not of a run"),
    "seeds": (["--seeds", "0"], "--seeds"),
    "schedule": (["--schedule", "full-rank,dekay"], "decay|--schedule must be"),
    "schedules": (["--schedules", "full-rank,dekay"], "did you mean 'decay'"),
    "no-schedule": (["--schedules", "full-rank,"], "unknown schedule ''"),
    "log": (["--log", "tensorbord"], "did you mean 'tensorboard'"),
    "measure": (["--measure", "--budget", "0.5"], "either a budget or --measure"),
    "share": (["--share", "2"], "--share"),
    "published": (["--as-published"], "not a published experiment"),
}
HAVE = {
    "budget": ("train", "compare", "plan"),
    "negative-budget": ("train", "compare", "plan"),
    "large-budget": ("train", "compare", "plan"),
    "device": ("train", "compare", "sweep", "probe", "plan"),
    "data": ("train-images", "compare-images"),
    "out-in-a-file": ("train", "compare", "sweep"),
    "out-is-a-file": ("train", "compare", "sweep"),
    "out-owned": ("train", "compare", "sweep"),
    "out-with-files": ("train",),
    "meta": ("train", "compare", "sweep", "probe", "plan"),
    "endless": ("train", "compare", "sweep"),
    "large-seed": ("train",),
    "many-seeds": ("compare", "sweep", "probe"),
    "many-cells": ("sweep",),
    "seeds": ("compare", "sweep", "probe"),
    "schedule": ("train", "sweep", "plan"),
    "schedules": ("compare",),
    "no-schedule": ("compare",),
    "log": ("train",),
    "measure": ("train",),
    "share": ("probe",),
    "published": ("train", "plan"),
    "large-batch": ("train", "compare", "sweep", "probe"),
}
IMAGES = {"train-images": ["train", "cifar10-resnet20"],
          "compare-images": ["compare", "cifar10-resnet20"]}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which no step may be made."""

    def stepped(*_: object, **__: object) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr("dynarank.train.loop.Trainer._step", stepped)
    monkeypatch.setattr("dynarank.planning.headroom_runs.Probe.losses", stepped)
    monkeypatch.delenv("DYNARANK_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "command"),
    [(wrong, command) for wrong in WRONG for command in HAVE.get(wrong, tuple(COMMANDS))],
)
def test_a_wrong_request_is_refused_before_the_first_step(
    wrong: str, command: str, monkeypatch: pytest.MonkeyPatch, here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (here / "a-file").touch()
    (here / "full" / "decay").mkdir(parents=True)
    (here / "full" / "decay" / "notes.txt").touch()
    before = sorted(here.rglob("*"))
    options, says = WRONG[wrong]
    words = [*{**COMMANDS, **IMAGES}[command], *options]
    if wrong == "out-owned":
        with owned(here / "owned"):
            assert call(monkeypatch, *words) == 2
        (here / "owned").rmdir()
    else:
        assert call(monkeypatch, *words) == 2
    said = capsys.readouterr()
    told = " ".join(said.err.replace("│", " ").split())
    assert re.search(says, told), told
    assert "Traceback" not in told and "pydantic" not in told and "epoch 1" not in said.out
    assert sorted(here.rglob("*")) == before


def test_what_the_result_needs_is_checked_first(
    monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert call(monkeypatch, *COMMANDS["compare"]) == 2
    assert "scipy" in capsys.readouterr().err and not list(here.iterdir())


def test_cells_that_are_close_have_folders_of_their_own() -> None:
    epochs = parse_epochs("5.00001,5.00002") + parse_epochs("0.1:0.5:0.1")
    places = [_place(Path(), (1.0, epoch), 0) for epoch in epochs]
    assert len(set(places)) == 7 and places[4] == Path("inflate1-deflate0.3/seed0")
