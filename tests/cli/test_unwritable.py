"""A place that cannot be written is refused by the name that was asked for, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import call

TRAINS = ("--epochs", "1", "--train-limit", "64", "--test-limit", "32", "--quiet")
COMMANDS: dict[str, tuple[str, ...]] = {
    "init": ("init", "PLACE.toml"),
    "init --python": ("init", "PLACE.toml", "--python"),
    "report": ("report", "RUN", "--out", "PLACE.html"),
    "figures": ("report", "RUN", "--figures", "PLACE"),
    "spectrum": ("spectrum", "RUN", "--suggest", "PLACE.json", "--no-plot"),
    "safetensors": ("export", "RUN", "--to", "PLACE.safetensors"),
    "state": ("export", "RUN", "--to", "PLACE.pt"),
    "program": ("export", "RUN", "--to", "PLACE.pt2"),
    "train": ("train", "digits", "--schedule", "low-rank", *TRAINS, "--out", "PLACE"),
    "compare": ("compare", "digits", *TRAINS, "--seeds", "1", "--out", "PLACE"),
    "sweep": ("sweep", "digits", *TRAINS, "--inflate", "5", "--deflate", "20", "--out", "PLACE"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        words = ("train", "digits", "--schedule", "low-rank", *TRAINS, "--out", str(folder))
        assert call(patch, *words) == 0
    return folder


@pytest.mark.parametrize("where", ["/proc", "a file"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_refusal_names_what_was_asked_for_and_what_to_do(
    name: str,
    where: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("mine")
    place = f"{where}/absent"
    before = sorted(run.rglob("*"))
    words = [w.replace("PLACE", place).replace("RUN", str(run)) for w in COMMANDS[name]]
    assert call(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert place in told and ".tmp" not in told and "Errno" not in told, told
    assert "pass another" in told, told
    assert sorted(run.rglob("*")) == before and Path("a file").read_text() == "mine"
