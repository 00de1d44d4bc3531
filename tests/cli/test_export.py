"""``dynarank export``: files of a run that are the trained network, without dynarank."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from safetensors import safe_open
from torch import Tensor, nn

import dynarank as dr
from dynarank.layers import RankedLayer
from dynarank.train.batch_outline import outline, stand_in
from dynarank.train.trained import read_trained

OWN = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, words, mask):
        x = (self.embed(words) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.head(self.hidden(x).relu()), "mean": x}

def data():
    assert "NO_DATA" not in os.environ
    words = torch.randint(0, 50, (96, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(96, 6)
    both = {"words": words, "mask": mask, "labels": words[:, 0] % 3}
    return both, {name: value[:32] for name, value in both.items()}

recipe = dict(data=data, model=Net, schedules=["low-rank", "dynamic-rank"], epochs=3,
              learning_rate=0.1, rank=0.5, inflate=1.0, deflate=2.0, loss="cross-entropy",
              batch_size=16, layers=["hidden", "embed"])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank and a dynamic-rank run of a network of one's own."""
    home = tmp_path_factory.mktemp("runs")
    (home / "own.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert call(patch, "train", "own.py", "--out", "run", "--quiet") == 0
    return home / "run"


@pytest.fixture(autouse=True)
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def export(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*words: str, of: str = "low-rank") -> int:
        return call(monkeypatch, "export", str(runs / of), *words)

    return run


def outputs(model: Any, example: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(**example)


def test_the_network_of_a_run_is_made_again_without_data(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_DATA", "1")
    low, dynamic = (read_trained(runs / name) for name in ("low-rank", "dynamic-rank"))
    assert isinstance(low.model.hidden, RankedLayer) and not low.model.training
    assert not any(isinstance(m, RankedLayer) for m in dynamic.model.modules())
    assert low.example["words"].shape == (16, 6) and low.example["words"].max() < 50
    code = runs.parent / "own.py"
    before = code.read_text()
    code.write_text(before + "# changed")
    try:
        with pytest.raises(ValueError, match=r"own\.py has changed since the run began"):
            read_trained(runs / "low-rank")
    finally:
        code.write_text(before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pt2"])
def test_a_file_of_each_kind(suffix: str, export: Any, runs: Path, here: Path, capsys: Any) -> None:
    assert export("--to", f"net{suffix}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    (file,) = answer["files"]
    assert file["path"] == f"net{suffix}" and file["size"] == (here / f"net{suffix}").stat().st_size
    assert file["difference"] == 0.0 and file["outputs"] == ["logits", "mean"]
    trained = read_trained(runs / "low-rank")
    assert answer["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert answer["parameters"] < answer["full_rank"] and file["batch_sizes"] == [2, 3, 1]
    expected = outputs(trained.model, trained.example)["logits"]
    if suffix == ".pt2":
        model = torch.export.load(here / "net.pt2").module()
    else:
        model = dr.to_plain(trained.model)
        nn.init.zeros_(model.head.weight)
        if suffix == ".pt":
            model.load_state_dict(torch.load(here / "net.pt", weights_only=True))
        else:
            from safetensors.torch import load_model

            load_model(model, here / "net.safetensors")
    torch.testing.assert_close(outputs(model, trained.example)["logits"], expected)


def test_an_onnx_file(export: Any, runs: Path, here: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export("--to", "net.onnx") == 0
    trained = read_trained(runs / "low-rank")
    session = onnxruntime.InferenceSession(str(here / "net.onnx"))
    assert [one.name for one in session.get_outputs()] == ["logits", "mean"]
    found = session.run(["logits"], {n: x.numpy() for n, x in trained.example.items()})[0]
    expected = outputs(trained.model, trained.example)["logits"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


LOADS = """
import sys
sys.modules["dynarank"] = None
import torch
example = torch.load(sys.argv[1], weights_only=True)
model = torch.export.load(sys.argv[2]).module()
torch.save(model(**example)["logits"], sys.argv[1])
"""


def test_a_folder_runs_where_dynarank_cannot_be_imported(
    export: Any, runs: Path, here: Path
) -> None:
    assert export("--to", "net") == 0
    assert {path.name for path in (here / "net").iterdir()} == {
        "README.md", "model.safetensors", "model.pt2",
    }  # fmt: skip
    trained = read_trained(runs / "low-rank")
    torch.save(trained.example, here / "example.pt")
    program = [sys.executable, "-c", LOADS, "example.pt", "net/model.pt2"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits = torch.load(here / "example.pt", weights_only=True)
    torch.testing.assert_close(logits, outputs(trained.model, trained.example)["logits"])


def test_the_code_of_the_model_card_loads_the_weights(export: Any, runs: Path, here: Path) -> None:
    assert export("--to", "net") == 0
    page = (here / "net" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "net")
        exec(code, names)
        network = type(read_trained(runs / "low-rank").model)(3)
        names["load_into"](network)
    trained = read_trained(runs / "low-rank")
    expected = outputs(trained.model, trained.example)["logits"]
    torch.testing.assert_close(outputs(network, trained.example)["logits"], expected)
    torch.testing.assert_close(outputs(names["model"], trained.example)["logits"], expected)
    for text in ("| `hidden` | 64x32 | low-rank | svd |", "seed 0, epochs: 3", "Test accuracy: ",
                 "FLOPs in a forward pass", "dynarank export "):  # fmt: skip
        assert text in page, text


def test_factors_that_a_run_ends_with_are_exact(export: Any, runs: Path, here: Path) -> None:
    """Its merged weights would only tell them up to rounding."""
    trained = read_trained(runs / "low-rank")
    assert export("--to", "net.safetensors") == 0
    with safe_open(here / "net.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("hidden.0.weight"), trained.model.hidden.down)
        layers = json.loads(file.metadata()["layers"])
        assert layers["hidden"][0].startswith("Linear(in_features=32")
        assert file.metadata()["Recipe"] == "own"


def test_keep(export: Any, here: Path, capsys: Any) -> None:
    sizes: dict[str, int] = {}
    for keep in ("cheaper", "factors", "merged"):
        assert export("--to", f"{keep}.pt", "--keep", keep, "--json") == 0
        sizes[keep] = json.loads(capsys.readouterr().out)["parameters"]
    assert sizes["cheaper"] <= sizes["factors"] < sizes["merged"]
    assert export("--to", "a.pt", "--keep", "all") == 2


def test_the_batch_size_can_be_fixed(export: Any, here: Path) -> None:
    assert export("--to", "net.pt2", "--fixed-batch", "4") == 0
    model = torch.export.load(here / "net.pt2").module()
    example = {"words": torch.ones(4, 6, dtype=torch.long), "mask": torch.ones(4, 6)}
    assert outputs(model, example)["logits"].shape == (4, 3)
    with pytest.raises(Exception, match=r"4|[Gg]uard|shape"):
        outputs(model, {name: value[:3] for name, value in example.items()})


def test_what_is_refused(export: Any, runs: Path, here: Path, capsys: Any) -> None:
    def refused(*words: str, of: str = "low-rank") -> str:
        before = sorted(here.rglob("*"))
        assert export(*words, of=of) == 2
        assert sorted(here.rglob("*")) == before
        return capsys.readouterr().err

    assert "choose one by --schedule" in refused("--to", "a.pt", of="")
    assert "one of the suffixes .safetensors, .onnx" in refused("--to", "a.bin")
    assert "the folder b does not exist" in refused("--to", "b/a.pt")
    own = runs / "low-rank" / "model.safetensors"
    before = own.read_bytes()
    (here / "link.safetensors").symlink_to(own)
    for place in (str(own), "link.safetensors"):
        assert "is a run's own file" in refused("--to", place, "--force")
    assert own.read_bytes() == before
    (here / "a.pt").write_text("mine")
    assert "a.pt exists already and is not overwritten; --force" in refused("--to", "a.pt")
    assert (here / "a.pt").read_text() == "mine"
    (here / "c").mkdir()
    (here / "c" / "mine.txt").write_text("mine")
    assert "files that are not of an export (mine.txt)" in refused("--to", "c", "--force")
    assert export("--to", "a.pt", "--force") == 0 and (here / "a.pt").stat().st_size > 1000
    assert export("--to", "d", "--quiet") == export("--to", "d", "--force") == 0


def test_one_of_several_runs_is_chosen(export: Any, runs: Path, here: Path, capsys: Any) -> None:
    assert export("--to", "a.pt", "--schedule", "low-rank", "--seed", "0", of="") == 0
    assert export("--to", "b.pt", "--schedule", "none", of="") == 2
    assert "no such run: choose one by --schedule low-rank --seed 0, or" in capsys.readouterr().err


def test_damaged_and_unfinished_runs(
    export: Any, runs: Path, here: Path, capsys: Any, tmp_path: Path
) -> None:
    for of, name in (("low-rank", "factors"), ("low-rank", "model"), ("dynamic-rank", "model")):
        weights = runs / of / f"{name}.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        try:
            assert export("--to", "a.pt", of=of) == 2
            told = capsys.readouterr().err
            assert f"{name}.safetensors" in told and "has changed" in told
        finally:
            weights.write_bytes(whole)
    records = runs / "low-rank" / "records.jsonl"
    lines = records.read_bytes()
    records.write_bytes(b"".join(lines.splitlines(keepends=True)[:-1]))
    try:
        assert export("--to", "a.pt") == 2
        assert "is not finished: go on with it" in capsys.readouterr().err
    finally:
        records.write_bytes(lines)
    assert not list(here.iterdir())


def test_a_built_in_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "digits", "--schedule", "low-rank", "--epochs", "1", "--out", "run"]
    assert call(monkeypatch, *words, "--train-limit", "128", "--test-limit", "50", "--quiet") == 0
    assert call(monkeypatch, "export", "run", "--to", "net.pt2") == 0
    model = torch.export.load(here / "net.pt2").module()
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(2, 3),
        (torch.randint(0, 9, (2, 4)), torch.ones(2, 4, dtype=torch.bool)),
        {"x": [torch.randn(2, dtype=torch.float64), None], "flag": True},
        torch.zeros(2, 3, dtype=torch.long),
    ],
)
def test_inputs_are_told_by_their_outline(batch: Any) -> None:
    told = json.loads(json.dumps(outline(batch)))
    again = stand_in(told)
    assert outline(again) == told or "below" in json.dumps(told)
    ours, theirs = (torch.utils._pytree.tree_leaves(one) for one in (batch, again))
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.is_floating_point() or other.max() <= one.max()
        else:
            assert one == other
    assert outline({"x": object()}) is None
