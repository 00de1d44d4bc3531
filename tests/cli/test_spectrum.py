"""``dynarank spectrum``: the table, its verdicts and plan, and what costs the picture alone."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from stored import random, write

from dynarank.cli.spectrum import spectrum
from dynarank.cli.spectrum_rows import sparkline
from dynarank.cli.streaming import Column, StreamedTable
from dynarank.files.reading import DamagedFileError
from dynarank.form_data import read_plan
from dynarank.forms import LowRank

module = importlib.import_module("dynarank.cli.spectrum")  # the package has the command itself


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve layers, of which number 2 has rank 1; and a tensor that is not known."""
    monkeypatch.chdir(tmp_path)
    layers = {f"h.{i}.weight": torch.randn(32, 32) for i in range(12)}
    layers["h.2.weight"] = torch.outer(random(32), torch.ones(32))
    layers["wte.weight"] = torch.randn(50, 32)
    layers["q.weight"] = torch.ones(4, 4, dtype=torch.int8)
    return write(tmp_path, layers)


def test_the_table_decides(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum(model, no_plot=True)
    _, heading, *rows, total, verdict, left = capsys.readouterr().out.splitlines()
    assert heading.split() == (
        "layer shape effective of full 99% break-even saved singular values verdict".split()
    )
    assert [row.split()[0] for row in rows] == [*(f"h.{i}" for i in range(12)), "wte"]
    assert rows[2].split()[1:7] == ["32x32", "1.0", "3%", "1", "15", "960"]
    assert rows[2].endswith("cut to 1: -94%") and rows[-1].endswith("leave: embedding")
    assert " keep: " in rows[3] and rows[3].split()[6] == "-"
    assert total.endswith("saves 960 (6.9%) in 1 of 12 layers.")
    assert verdict == "1 of 12 layers keeps 99% of its energy at half size."
    assert left.startswith("Left out: q.weight (int8 4x4): int8 without scales")


def test_json_holds_it_all(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum(model, energy=0.9, as_json=True, no_plot=True)
    found = json.loads(capsys.readouterr().out)
    assert found["energy"] == 0.9 and list(found["plan"]) == ["h.2"]
    assert [one["name"] for one in found["left_out"]] == ["q.weight"]
    assert set(found["left_out"][0]) == {"name", "shape", "dtype", "reason"}
    layer = found["layers"][2]
    assert layer["break_even_rank"] == 15 and layer["saved_parameters"] == 960
    assert layer["lambda_rank"] == 16 and len(layer["singular_values"]) == 32
    assert found["layers"][-1]["role"] == "embedding"


def test_lambda_comes_with_its_rank(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum(model, layers=["h.2"], rank=4, no_plot=True)
    _, heading, row, *_ = capsys.readouterr().out.splitlines()
    assert "lambda" in heading and "1.000" in row


def test_a_plan_is_written_that_is_read_again(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spectrum(model, suggest=Path("plan.json"), no_plot=True)
    assert read_plan("plan.json") == {"h.2": LowRank(1)}
    assert "Plan: plan.json, 1 layer\n" in capsys.readouterr().out


def test_only_the_layers_of_a_pattern(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum(model, layers=["h.1?", "wte"], no_plot=True)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[:3]] == ["h.10", "h.11", "wte"]
    with pytest.raises(ValueError, match=r"--layers 'h\.12' matches no layer; there is"):
        spectrum(model, layers=["h.1", "h.12"], no_plot=True)


def test_one_expert_is_named_as_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"experts.up_proj": torch.randn(12, 4, 4)})
    spectrum(tmp_path, layers=["experts.up_proj[11]"], no_plot=True)
    _, _, row, *_ = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "experts.up_proj[11]"


REFUSED = {
    "energy": ({"energy": 1.5}, "--energy is a share above 0 and up to 1"),
    "zero energy": ({"energy": 0.0}, "--energy is a share above 0 and up to 1"),
    "no folder": ({"suggest": Path("no/plan.json")}, "--suggest must be a file in an existing"),
    "a folder": ({"suggest": Path("folder")}, "--suggest must be a file in an existing"),
    "two files": ({"suggest": Path("p.json"), "other": Path("model.safetensors")}, "for one file"),
    "device": ({"device": "warp"}, "device 'warp' cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    case: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "folder").mkdir()
    monkeypatch.setattr(module, "Model", lambda *_: pytest.fail("it was read"))
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        spectrum(model, no_plot=True, **arguments)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_costs_the_picture_alone(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "x-spectrum.png")

    monkeypatch.setattr(module, "save_figure", refuse)
    spectrum(model)
    out = capsys.readouterr().out
    assert "h.11" in out and "No figure: " in out and "Permission denied" in out


def test_a_plan_is_refused_at_once_where_it_cannot_be_written(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        spectrum(model, suggest=Path("plan.json"), no_plot=True)


def test_two_checkpoints_of_any_layout_are_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"module.h.2.weight": torch.eye(32)}}, tmp_path / "other.pt")
    spectrum(model, Path("other.pt"), layers=["h.2"])
    title, heading, row, *rest = capsys.readouterr().out.splitlines()
    assert "B = other.pt" in title and heading.count("B - A") == 3
    assert row.split()[1:] == "32x32 1.0 32.0 +31.0 1.0 32.0 +31.0 1 32 +31".split()
    assert rest[0].startswith("Left out: q.weight") and rest[-1].startswith("Figure: ")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(DamagedFileError, match="it is a GGUF file"):
        spectrum(tmp_path / "m.gguf")


@pytest.mark.parametrize("count", [1, 2, 5, 15, 16, 17, 200])
def test_a_sparkline_falls_with_the_values(count: int) -> None:
    values = [1.0 - i / count for i in range(count)]
    line = sparkline(values)
    assert len(line) == min(count, 16) and line == "".join(sorted(line, reverse=True))
    assert line[0] == "█" and len(set(line)) >= min(count, 8) - 1
    assert sparkline([]) == sparkline([0.0, 0.0]) == ""


LONG = ["a", "b." * 100 + "weight", "層.名前" * 20]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_rows_fit_the_terminal(width: int) -> None:
    stream = io.StringIO()
    out = Console(file=stream, width=width, force_terminal=True, color_system=None)
    columns = [Column("shape", 12, 1, True), Column("effective", rank=3), Column("99%", rank=2),
               Column("singular values", 16, 5), Column("verdict", 14, left=True)]  # fmt: skip
    with StreamedTable(out, "title", columns, LONG, [1.0] * 3) as table:
        for name in LONG:
            table.working_on(name)
            table.add(name, ["512x512x3x3", "10.5", "12", "█" * 16, "cut to 12: -9%"])
    lines = [line for line in stream.getvalue().splitlines() if "cut to 12" in line]
    assert len(lines) == 3
    shown = [line.split("\x1b[2K")[-1].split("\r")[-1] for line in lines]
    from rich.cells import cell_len

    assert all(cell_len(line) <= width for line in shown)
    assert len({cell_len(line) for line in shown}) == 1


def test_a_long_name_outside_a_terminal_is_whole_and_moves_its_row_alone() -> None:
    stream = io.StringIO()
    with StreamedTable(Console(file=stream, width=120), "t", [Column("n")], LONG, [1] * 3) as table:
        for name in LONG:
            table.add(name, ["1"])
    _, _, first, second, _ = stream.getvalue().splitlines()
    assert len(first) == 64 + 1 + 6 and second.startswith(LONG[1])


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.eye(4), "a": torch.eye(4)}, tmp_path / "m.safetensors")
    with pytest.raises(DamagedFileError, match="are both the weight of a"):
        spectrum(tmp_path / "m.safetensors")


def test_two_checkpoints_without_a_common_name_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stem, name in (("a", "model.l.weight"), ("b", "l.weight")):
        save_file({name: random(20, 20)}, tmp_path / f"{stem}.safetensors")
    spectrum(tmp_path / "a.safetensors", tmp_path / "b.safetensors", no_plot=True)
    told = "No weight has the same name in A and B, which begin with model.l and l.\n"
    assert capsys.readouterr().out.endswith(told)
    spectrum(tmp_path / "a.safetensors", tmp_path / "a.safetensors", no_plot=True)
    assert "No weight" not in capsys.readouterr().out
