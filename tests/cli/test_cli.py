"""The commands as a user types them: output, exit codes, JSON, help."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from command_line import call
from rich.console import Console
from safetensors.torch import save_file

from dynarank.train.recipes import load_recipe, recipe_names


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DYNARANK_DATA", raising=False)
    return tmp_path


@pytest.mark.usefixtures("real_page")
def test_train_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    code = call(monkeypatch, "train", "digits", "--epochs", "3", "--train-limit", "128")
    out = capsys.readouterr().out
    assert code == 0
    for words in ("test accuracy", "trainable", "training FLOPs", "peak memory", "wall-clock"):
        assert all(word in out for word in words.split())
    folder = next((here / "runs").iterdir())
    for schedule in ("full-rank", "low-rank", "dynamic-rank"):
        assert schedule in out
        names = {path.name for path in (folder / schedule).iterdir()}
        factors = {"factors.safetensors"} if schedule == "low-rank" else set()
        assert names == {"config.json", "records.jsonl", "model.safetensors"} | factors
    assert "0.294x" in out and "1.000x" in out
    page = (folder / "report.html").read_text()
    assert page.startswith("<!") and "dynamic-rank" in page
    assert "learning rate, 0.1. Low-rank networks often want another" in " ".join(out.split())


def test_train_gives_no_advice_on_low_rank_networks_where_none_was_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = ["train", "digits", "--epochs", "1", "--train-limit", "64", "--schedule", "full-rank"]
    assert call(monkeypatch, *words) == 0
    assert "learning rate" not in capsys.readouterr().out


def test_train_json_and_report_and_spectrum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = ["train", "digits", "--epochs", "3", "--train-limit", "128", "--schedule",
             "dynamic-rank-low", "--out", "one", "--json"]  # fmt: skip
    assert call(monkeypatch, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["runs"]) == {"dynamic-rank-low"}
    assert 0 < result["runs"]["dynamic-rank-low"]["relative_flops"] < 1
    assert {p.name for p in (here / "one").iterdir()} == {
        "common.json", "config.json", "records.jsonl", "model.safetensors", "factors.safetensors",
        "report.html",
    }  # fmt: skip

    assert call(monkeypatch, "report", "one", "--out", "page.html", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["schedule"] == "dynamic-rank-low"
    assert (here / "page.html").exists()

    assert call(monkeypatch, "spectrum", "one/model.safetensors") == 0
    out = capsys.readouterr().out
    assert "conv2" in out and "effective" in out and "█" in out
    assert (here / "model-spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_plan_shows_layers_and_phases_and_warns_of_what_the_adapter_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "cifar10-resnet20", "--as-published") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "stages.2.2.conv2" in out and "272,762" in out and "155,170" in out
    assert "0.567x" in out and "0.886x" in out
    assert re.search(r"adapted phase costs more than full-rank training: 1\.22\dx", out)
    assert "head (not in the layers of the recipe)" in out


def test_plan_says_why_layers_are_left_and_names_short_times(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.toml").write_text(
        'data = "digits"\nmodel = "mlp"\nepochs = 7\nlearning_rate = 0.1\nbatch_size = 100\n'
        "model_options = { inputs = 64, width = 64 }\n"
    )
    assert call(monkeypatch, "plan", "own.toml") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "head (output layer)." in out and "of the recipe" not in out
    assert re.search(r"\b\d\.\d{3} to \d", out) and not re.search(r"\d\.\d{4,} to", out)


def test_plan_says_what_passes_through_the_network_before_cuts(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def data():\n"
        "    rows = torch.zeros(320, 32), torch.zeros(320, dtype=torch.long)\n"
        "    return {'train': rows, 'test': rows}\n"
        "def model():\n"
        "    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))\n"
    )
    (here / "own.toml").write_text(
        'data = "own.py:data"\nmodel = "own.py:model"\nepochs = 10\nlearning_rate = 0.1\n'
        "batch_size = 32\nbudget = 0.8\n"
    )

    def planned(*more: str) -> str:
        assert call(monkeypatch, "plan", "own.toml", *more) == 0
        return " ".join(capsys.readouterr().out.split())

    calibration = json.loads(planned("--schedule", "decay", "--json"))["calibration"]
    assert calibration["cuts"] == 8 and calibration["batches"] == 8 * (320 // 32)  # an epoch each
    # 80 passes beside 100 steps, each about a third of a step at most.
    assert 0.13 < calibration["relative_flops"] < 80 / 300 * 1.5
    words = "Before the 8 cuts 80 batches pass through the network: 0."
    assert words in planned("--schedule", "decay")
    assert "pass through" not in planned("--schedule", "full-rank")
    # Where no data is read, nothing is known of the length.
    assert call(monkeypatch, "plan", "digits", "--schedule", "decay", "--json") == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["relative_flops"] is None


def test_plan_of_the_second_experiment_has_the_published_parameters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # no cell is wrapped then
    assert call(monkeypatch, "plan", "cifar100-wrn28-10") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 to 80 low-rank 20,590,236" in out and "80 to 170 full-rank 36,539,124" in out
    assert re.search(r"stages\.0\.0\.widen, [^()]*head \(not in the layers of the recipe\)", out)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_can_be_planned_without_data(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", recipe, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    stops = [phase["stop_epoch"] for phase in plan["phases"]]
    within = load_recipe(recipe).budget is not None  # dynamic rank is then a decay in eight cuts
    assert len(stops) == (9 if within else 3) and stops[-1] == load_recipe(recipe).epochs
    assert plan["relative_training_flops"] < 1


def test_plan_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plan", "cifar10-resnet20", "--schedule", "low-rank", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["phases"]) == 1 and len(plan["phases"][0]["layers"]) == 19
    assert plan["relative_training_flops"] == pytest.approx(0.567, abs=0.003)
    assert plan["phases"][0]["layers"][0]["rank"] == 8
    memory = plan["phases"][0]["memory"]
    assert memory["parameters"] == 4 * plan["phases"][0]["total_parameters"]
    assert memory["optimizer"] == memory["gradients"] and memory["activations"] > 0
    assert plan["phases"][0]["all_reduced_bytes_per_step"] == memory["gradients"]


def test_spectrum_as_json_of_any_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    weights = {"a.weight": torch.diag(torch.tensor([4.0, 2.0, 1.0])), "a.bias": torch.ones(3),
               "b.weight": torch.full((2, 2), float("nan"))}  # fmt: skip
    save_file(weights, "any.safetensors")
    words = ["spectrum", "any.safetensors", "--rank", "1", "--json", "--plot", "p.svg"]
    assert call(monkeypatch, *words) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["layer"] == "a" and layers[0]["stable_rank"] == pytest.approx(21 / 16)
    assert layers[1] == {"layer": "b", "shape": [2, 2], "finite": False}
    assert layers[0]["lambda"] == pytest.approx(4 / 7) and layers[0]["lambda_rank"] == 1
    assert "<svg" in (here / "p.svg").read_text()


def test_spectrum_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a[bold]b", "c[/bold]", ":smile:"]
    weights = {f"{name}.weight": torch.randn(4, 4) for name in names}
    save_file({**weights, "empty": torch.zeros(0, 4)}, "odd.safetensors")
    assert call(monkeypatch, "spectrum", "odd.safetensors", "--no-plot") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "empty" not in out


def test_spectrum_of_two_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    one = {"a.weight": torch.diag(torch.tensor([4.0, 2.0])), "gone.weight": torch.eye(3)}
    two = {"a.weight": torch.eye(2), "new.weight": torch.full((2, 2), float("nan"))}
    for name, weights in (("one", one), ("two", two)):
        (here / name).mkdir()
        save_file(weights, here / name / "model.safetensors")
    assert call(monkeypatch, "spectrum", "one", "two") == 0
    title, heading, *rows, picture = capsys.readouterr().out.splitlines()
    assert title == "Rank metrics: A = one, B = two" and heading.count("B - A") == 3
    cells = {row.split()[0]: row.split()[2:] for row in rows}
    assert cells["a"] == "1.9 2.0 +0.1 1.2 2.0 +0.8 2 2 +0".split()
    assert cells["gone"] == "3.0 - 3.0 - 3 -".split()
    assert cells["new"] == ["-", "nan"] * 3
    assert picture == "Figure: one-two-spectrum.png"
    assert (here / "one-two-spectrum.png").read_bytes().startswith(b"\x89PNG")

    assert call(monkeypatch, "spectrum", "one", "two", "--json", "--no-plot") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == ["one", "two"]
    layers = {layer["layer"]: layer for layer in found["layers"]}
    assert list(layers) == ["a", "gone", "new"]
    assert layers["a"]["first"]["stable_rank"] == pytest.approx(1.25)
    assert layers["a"]["second"]["stable_rank"] == pytest.approx(2.0)
    assert layers["gone"]["second"] is None and layers["new"]["second"]["finite"] is False


def test_spectrum_shows_each_row_when_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    """A shard that is cut while the command is at work: the rows before it have been shown."""
    from dynarank.monitors.weight_files import TensorFile

    save_file({"a": torch.eye(4), "b": torch.eye(4)}, "m.safetensors")
    shown: list[str] = []
    read = TensorFile.read

    def watched(file: TensorFile, name: str, index: int | None = None) -> torch.Tensor:
        shown.append(capsys.readouterr().out)
        return read(file, name, index)

    monkeypatch.setattr(TensorFile, "read", watched)
    assert call(monkeypatch, "spectrum", "m.safetensors", "--no-plot") == 0
    assert [out.split()[0] for out in [shown[1], capsys.readouterr().out]] == ["a", "b"]


REFUSED = {
    "recipe": (["train", "digit"], r"unknown recipe 'digit'; did you mean 'digits'\?.*cifar10"),
    "schedule": (
        ["train", "digits", "--schedule", "lorra"],
        r"unknown schedule 'lorra'; known: full",
    ),
    "plan": (["plan", "cifar"], "unknown recipe 'cifar'"),
    "data": (["train", "cifar10-resnet20"], r"--data|DYNARANK_DATA"),
    "folder": (["train", "cifar10-resnet20", "--data", "nowhere"], "nowhere"),
    "log": (
        ["train", "digits", "--log", "paper"],
        "unknown logging backend 'paper'; known: tensorboard",
    ),
    "device": (["train", "digits", "--device", "warp"], "device 'warp' cannot be used"),
    "precision": (["train", "digits", "--precision", "int3"], "got 'int3'"),
    "limit": (["train", "digits", "--train-limit", "10"], "do not fill one batch of 64"),
    "too-many": (["train", "digits", "--train-limit", "9999"], "9,?999"),
    "published": (["train", "digits", "--as-published"], "not a published experiment"),
    "report": (["report", "nowhere"], "no run folder at nowhere"),
    "file": (["spectrum", "nowhere.safetensors"], "no file nowhere.safetensors"),
    "plot": (["spectrum", "whole.safetensors", "--plot", "x.doc"], "--plot must be a file"),
    "runs": (["spectrum", "runs-of-two"], "several runs, name one or two of"),
    "second": (
        ["spectrum", "whole.safetensors", "broken.safetensors"],
        "not a complete safetensors",
    ),
    "broken": (["spectrum", "broken.safetensors"], "not a complete safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_line_and_exit_2(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.ones(8, 8)}, "whole.safetensors")
    Path("broken.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-9])
    for run in ("a", "b"):
        (Path("runs-of-two") / run).mkdir(parents=True)
        shutil.copy("whole.safetensors", f"runs-of-two/{run}/model.safetensors")
    words, pattern = REFUSED[case]
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("dynarank: error: ") and re.search(pattern, error)
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_a_diverged_run_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynarank.train.loop import DivergedError

    def diverge(*_: object, **__: object) -> None:
        raise DivergedError("the training loss of epoch 1 is nan")

    monkeypatch.setattr("dynarank.cli.job_runner.run_schedule", diverge)
    assert call(monkeypatch, "train", "digits", "--epochs", "1") == 1
    assert "loss of epoch 1 is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rank",
    [
        "1.5",
        "-3",
        "0",
        "0.0",
        "16.0",
        "nan",
        "inf",
        "1e400",
        "half",
        "",
        "1.5:out",
        "8:out:min",
        "0.5:in",
        "0.5:",
    ],
)
@pytest.mark.parametrize("command", ["train digits", "plan digits", "compare digits",
                                     "sweep digits --inflate 5 --deflate 20",
                                     "spectrum whole.safetensors"])  # fmt: skip
def test_a_rank_that_is_neither_whole_nor_a_share_is_refused_by_every_command(
    command: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    here: Path
) -> None:  # fmt: skip
    assert call(monkeypatch, *command.split(), "--rank", rank) == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"Invalid value for '--rank': {rank} is neither a rank".replace(":  is", ": is") in told
    assert "such as 16" in told and "such as 0.25" in told
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("rank", "meant"),
    [
        ("1", 1),
        ("4", 4),
        ("400", 10),
        ("1.0", 5),  # of 10 x 12, factors of rank 5 have 110 parameters
        ("0.5", 2),
        ("1.0:out", 10),
        ("0.5:out", 5),
        ("0.35:min", 3),
        (".25:cost", 1),
    ],
)
def test_a_whole_number_is_a_rank_and_a_number_with_a_point_is_a_share(
    rank: str, meant: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.randn(10, 12)}, "any.safetensors")
    words = ["any.safetensors", "--rank", rank, "--no-plot", "--json"]
    assert call(monkeypatch, "spectrum", *words) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["lambda_rank"] == meant


@pytest.mark.parametrize(
    ("rank", "meant"), [("1", [1, 1, 1]), ("1.0", [52, 104, 115]), ("1.0:out", [64, 128, 128])]
)
def test_rank_1_and_the_whole_cost_are_told_apart(
    rank: str,
    meant: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["digits", "--schedule", "low-rank", "--rank", rank, "--json"]
    assert call(monkeypatch, "plan", *words) == 0
    layers = json.loads(capsys.readouterr().out)["phases"][0]["layers"]
    assert [layer["rank"] for layer in layers] == meant


LEFT_OUT = "digits --epochs 2 --train-limit 128 --out x"
REFUSED_LATE = {  # only the second schedule is refused
    "rank": (f"train {LEFT_OUT} --rank 1000", "digits, low-rank: .*rank 1000 is above the limit"),
    "budget": (f"train {LEFT_OUT} --budget 0.01", "low-rank: .*below the cost of the smallest"),
    "measure": (f"train {LEFT_OUT} --budget 0.6 --measure", "either a budget or --measure"),
    "compare": (f"compare {LEFT_OUT} --seeds 1 --rank 1000", "low-rank: .*above the limit"),
    "compare-budget": (f"compare {LEFT_OUT} --budget 0.01", "low-rank: .*below the cost of the"),
    "sweep": (f"sweep {LEFT_OUT} --inflate 5 --deflate 20 --rank 1000", "above the limit"),
}


@pytest.mark.parametrize("case", REFUSED_LATE)
def test_every_schedule_is_checked_before_the_first_run(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words, pattern = REFUSED_LATE[case]
    assert call(monkeypatch, *words.split()) == 2
    said = capsys.readouterr()
    assert re.search(pattern, said.err) and "epoch 1" not in said.out
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", ["train", "plan", "spectrum", "report"])
def test_help_is_there_and_every_command_has_json(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert "--json" in capsys.readouterr().out


CHANGES = ("set", "lr", "batch-size")  # of the recipe
OPTIONS = {
    "train": {"data", "schedule", "seed", "epochs", "train-limit", "test-limit", "as-published",
              "out", "device", "precision", "compile", "json", "help", "rank", "decomposition",
              "measure", "log", "budget", "noise", "resume", "checkpoint-every", *CHANGES, "quiet"},
    "plan": {"budget", "schedule", "as-published", "json", "help", "rank", "decomposition",
             "measure", "processes", "device", "precision", *CHANGES},
    "probe": {"rank", "share", "seeds", "data", "decomposition", "train-limit", "device",
              "precision", "json", "help", *CHANGES, "quiet"},
    "compare": {"schedules", "seeds", "data", "rank", "decomposition", "epochs", "train-limit",
                "test-limit", "out", "device", "precision", "json", "help", "budget",
                "checkpoint-every", *CHANGES, "quiet"},
    "sweep": {"inflate", "deflate", "seeds", "schedule", "data", "rank", "decomposition", "epochs",
              "train-limit", "test-limit", "out", "device", "precision", "json", "help",
              "checkpoint-every", *CHANGES, "quiet"},
    "spectrum": {"energy", "suggest", "layers", "rank", "device", "plot", "no-plot", "json",
                 "help"},
    "report": {"out", "figures", "format", "json", "help"},
    "recipes": {"json", "help"},
    "schedules": {"json", "help"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "waits"), [("closed-loop", True), ("cuttlefish", True), ("rotating", False)]
)
def test_a_plan_says_what_it_cannot_know(
    schedule: str, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "digits", "--schedule", schedule) == 0
    assert ("until its first decision" in " ".join(capsys.readouterr().out.split())) == waits
    assert call(monkeypatch, "plan", "digits", "--schedule", schedule, "--json") == 0
    assert json.loads(capsys.readouterr().out)["until_first_decision"] == waits


def test_a_budget_from_the_command_line_is_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "digits", "--budget", "0.5", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["relative_training_flops"]
    small = ["--epochs", "5", "--train-limit", "1344", "--schedule", "dynamic-rank"]
    assert call(monkeypatch, "train", "digits", *small, "--budget", "0.5", "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"].values()
    assert planned == pytest.approx(0.5, rel=0.01)
    assert run["relative_flops"] == pytest.approx(0.5, rel=0.01)
    assert call(monkeypatch, "train", "digits", *small, "--budget", "0.01") == 2
    assert "nearest possible is" in capsys.readouterr().err


@pytest.mark.parametrize("command", OPTIONS)
def test_options_stay_few(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is one recipe; flags are for paths and overrides. Adding one is a decision."""
    call(monkeypatch, command, "--help")
    found = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    mentioned_elsewhere = {"no-compile", "nproc-per-node"}  # the latter of torchrun
    assert found - mentioned_elsewhere == OPTIONS[command]


def test_the_installed_command_runs() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "dynarank", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in OPTIONS)


def test_tables_are_wrapped_between_words_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = lambda **_: Console(width=80, highlight=False)  # noqa: E731
    small = ["digits", "--epochs", "2", "--train-limit", "128"]
    for command, more, words in (
        ("train", ["--schedule"], "trainable training FLOPs accuracy wall-clock"),
        ("compare", ["--seeds", "2", "--schedules"], "accuracy peak mean FLOPs memory time"),
    ):
        monkeypatch.setattr(f"dynarank.cli.{command}.console", narrow)
        assert call(monkeypatch, command, *small, *more, "full-rank,dynamic-rank-low") == 0
        lines = capsys.readouterr().out.splitlines()
        rule = next(i for i, line in enumerate(lines) if line.lstrip().startswith("───"))
        heading, rows = " ".join(lines[rule - 3 : rule]), "\n".join(lines[rule + 1 :])
        assert set(words.split()) <= set(heading.split())
        assert "dynamic-rank-low" in rows and "1.000x" in rows and "241,898" in rows
        assert max(map(len, lines[rule - 3 : rule + 5])) <= 80


def test_the_phases_of_a_plan_fit_80_columns_with_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = Console(width=80, highlight=False)
    monkeypatch.setattr("dynarank.cli.plan.console", Mock(return_value=narrow))
    assert call(monkeypatch, "plan", "text-gpt") == 0
    phases = capsys.readouterr().out.split("Per phase, whole model")[1]
    assert "1,902,720" in phases and "2,492,544" in phases and "trainable" in phases
    assert max(map(len, phases.splitlines())) <= 80 and "all-reduced" not in phases.lower()

    assert call(monkeypatch, "plan", "text-gpt", "--processes", "4") == 0
    phases = capsys.readouterr().out.split("Per phase, whole model")[1]
    told = " ".join(phases.split()).split("All-reduced a step with DDP: ")[1]
    assert told.startswith("2.8 MiB (epochs 0 to ") and "each of 4 processes sends 1.5" in told
    assert max(map(len, phases.splitlines())) <= 80


def test_probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dynarank.train.probe.FEWEST", 10)
    words = ["probe", "digits", "--rank", "0.5", "--share", "0.001", "--train-limit", "640"]
    assert call(monkeypatch, *words, "--seeds", "1") == 0
    out = capsys.readouterr().out
    assert "9 runs of 10 steps" in out and "30% of the steps of a run" in out
    assert "low rank" in out and "full, cut" in out and "0.5" in out

    assert call(monkeypatch, *words, "--seeds", "1", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["recipe"] == "digits" and printed["steps"] == 10
    assert [one["rank"] for one in printed["ranks"]] == [0.5]


def test_probe_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["probe", "digit"], "did you mean 'digits'"),
        (["probe", "digits", "--share", "0"], "(0, 1], got 0"),
        (["probe", "digits", "--rank", "0.5,x"], "x is neither a rank"),
    ):
        assert call(monkeypatch, *words) == 2
        assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
