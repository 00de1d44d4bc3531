"""Lightning's checkpoints in each form: tested, predicted with, loaded, resumed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from host_runs import DEFLATE, ENDINGS, INFLATE, STEPS, batches, forms_at, schedule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import QUIET, Loader, Module, every_four, fit, trainer
from warm_python import run as python

import dynarank as dr
from dynarank.integrations.lightning import DynamicRankCallback

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET]
SAVED_AT = (4, 12, 20)  # low-rank, full-rank, and the ending


@pytest.fixture(scope="module", params=ENDINGS)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    fit(Module(), request.param, every_four(folder))
    return folder, request.param


def outputs(path: Path) -> torch.Tensor:
    """What the model of a checkpoint makes of a batch."""
    model = Module()
    states = torch.load(path, weights_only=True)
    dr.RankScheduler(model, model.configure_optimizers(), schedule(), STEPS)  # follows loads
    model.load_state_dict(states["state_dict"])
    return model(batches(1)[0][0]).detach()


def predictions(module: Any, path: Path, *callbacks: Any, **more: Any) -> torch.Tensor:
    loader: Any = torch.utils.data.DataLoader(batches(1), batch_size=None)
    found: Any = trainer(*callbacks).predict(module, loader, ckpt_path=path, **more)
    return found[0]


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize("with_callback", [True, False])
def test_a_plain_module_takes_the_form_of_a_checkpoint(
    run: Any, step: int, with_callback: bool
) -> None:
    folder, to = run
    path, callbacks = folder / f"step={step}.ckpt", [DynamicRankCallback(schedule())]
    own = callbacks if with_callback else []
    module = Module(9)
    assert torch.equal(predictions(module, path, *own), outputs(path))
    assert type(dr.current_plan(module)["net.0"]) is forms_at(step, to)
    for call in ("test", "validate"):
        module = Module(9)
        loader: Any = torch.utils.data.DataLoader(batches(1), batch_size=None)
        getattr(trainer(*own), call)(module, loader, ckpt_path=path, verbose=False)
        assert torch.equal(module(batches(1)[0][0]), outputs(path))


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize("strict", [None, True, False])
def test_a_module_is_loaded_without_a_trainer(run: Any, step: int, strict: Any) -> None:
    folder, to = run
    path = folder / f"step={step}.ckpt"
    module = Module.load_from_checkpoint(path, strict=strict, map_location="cpu")
    assert torch.equal(module(batches(1)[0][0]), outputs(path))
    assert type(dr.current_plan(module)["net.0"]) is forms_at(step, to)


def test_a_factorized_module_takes_a_full_rank_checkpoint(run: Any) -> None:
    class Factorized(Module):
        def __init__(self) -> None:
            super().__init__(9)
            dr.factorize(self.net, 2, layers=["0", "2"])

    path = run[0] / "step=12.ckpt"
    assert torch.equal(Factorized.load_from_checkpoint(path)(batches(1)[0][0]), outputs(path))


def test_modules_of_other_states_load_as_before(tmp_path: Path) -> None:
    state = {"state_dict": Module(1).state_dict(), "pytorch-lightning_version": L.__version__}
    torch.save(state, tmp_path / "plain.ckpt")
    module = Module.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(module.net[0].weight, Module(1).net[0].weight)
    assert not module._load_state_dict_pre_hooks


def test_a_fresh_process_tests_a_checkpoint(run: Any, tmp_path: Path) -> None:
    folder, _ = run
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from host_runs import batches, schedule\n"
        "from lightning_runs import Module, trainer\n"
        "from dynarank.integrations.lightning import DynamicRankCallback\n"
        "loader = torch.utils.data.DataLoader(batches(1), batch_size=None)\n"
        "run = trainer(DynamicRankCallback(schedule()))\n"
        "found = run.predict(Module(9), loader, ckpt_path=sys.argv[1])\n"
        "torch.save(found[0], sys.argv[2])\n"
    )
    path, out = folder / "step=20.ckpt", tmp_path / "out.pt"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    python([script, path, out], env=env, check=True)
    assert torch.equal(torch.load(out), outputs(path))


# --- ways to save


@pytest.mark.parametrize("to", ENDINGS)
def test_the_best_checkpoint_of_another_form(to: str, tmp_path: Path) -> None:
    """The first of four epochs is the best: low-rank, when the run ends in another form."""

    class Worse(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("worse", float(self.global_step), batch_size=1)

    module, callback = Worse(), DynamicRankCallback(schedule(to))
    best = ModelCheckpoint(tmp_path, monitor="worse", save_top_k=1, filename="{step}")
    run = trainer(callback, best, max_epochs=4, limit_train_batches=6)
    loader: Any = torch.utils.data.DataLoader(batches(1), batch_size=None)
    run.fit(module, Loader(), loader)
    assert best.best_model_path.endswith("step=6.ckpt")
    assert type(dr.current_plan(module)["net.0"]) is forms_at(STEPS, to)
    found: Any = run.predict(dataloaders=loader, ckpt_path="best")
    assert torch.equal(found[0], outputs(tmp_path / "step=6.ckpt"))
    assert type(dr.current_plan(module)["net.0"]) is forms_at(6, to)


def test_weights_only(tmp_path: Path) -> None:
    folder = ModelCheckpoint(
        tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}", save_weights_only=True
    )
    fit(Module(), "adapted", folder)
    for path in (tmp_path / f"step={step}.ckpt" for step in SAVED_AT):
        assert "callbacks" not in torch.load(path, weights_only=True)
        assert torch.equal(predictions(Module(9), path), outputs(path))
        assert torch.equal(Module.load_from_checkpoint(path)(batches(1)[0][0]), outputs(path))
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        fit(Module(9), checkpoint=path)


class Saves(L.Callback):
    """A user's own, which saves after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(("to", "before"), [("adapted", True), ("low-rank", False)])
def test_a_checkpoint_of_a_callback_before_or_after_ours(
    to: str, before: bool, tmp_path: Path
) -> None:
    """Before ours, the last step is not counted yet, and the change it brings not made."""
    module, ours, own = Module(), DynamicRankCallback(schedule(to)), Saves(tmp_path)
    both: list[Any] = [own, ours] if before else [ours, own]
    trainer(*both, max_epochs=1).fit(module, Loader())
    for step in (INFLATE, DEFLATE, DEFLATE + 1):
        other = Module(9)
        fit(other, to, checkpoint=tmp_path / f"{step}.ckpt")
        assert other.losses == module.losses[step:], step
