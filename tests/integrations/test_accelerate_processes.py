"""Under Accelerate, two processes train as one does: DDP and FSDP2, through all changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from host_runs import (
    STEPS,
    adamw,
    batches,
    loss_of,
    mlp,
    plain_losses,
    ranks_of,
)
from process_pool import Pools
from warm_python import run as python

import dynarank as dr
from dynarank.integrations.accelerate import attach

pytestmark = pytest.mark.slow
AT = (8, 16, 20)  # the first two right at a change


@contextmanager
def launched() -> Generator[None]:
    """The environment that ``accelerate launch`` gives."""
    from accelerate.state import AcceleratorState

    own = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    own |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({key: str(value) for key, value in own.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for key in own:
            del os.environ[key]


def accelerator_of(kind: str, precision: str = "no") -> Any:
    """Accelerate shards on accelerators only: on the CPU its state is told that it may."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if kind == "ddp":
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    made = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=precision)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return made


class Run:
    def __init__(
        self, kind: str, to: str, seed: int = 0, precision: str = "no", *, before: bool = False
    ) -> None:
        self.accelerator = accelerator_of(kind, precision)
        model = mlp(seed)
        optimizer = adamw(model)
        ranks = ranks_of(model, optimizer, to) if before else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ranks = ranks or ranks_of(self.model, self.optimizer, to)
        self.handle = attach(self.accelerator, self.ranks)

    def train(self, save: Path | None = None, end: int = STEPS) -> list[float]:
        """Each process has half of a batch; the losses of the whole ones."""
        losses: list[float] = []
        half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        for inputs, targets in batches(STEPS)[self.ranks.last_step : end]:
            loss = loss_of(self.model, (inputs[half], targets[half]))
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ranks.step()
            losses.append(self.accelerator.gather(loss.detach()[None]).mean().item())
            if save and self.ranks.last_step in AT:
                self.accelerator.save_state(f"{save}/{self.ranks.last_step}")
        return losses


def trained(kind: str, to: str, folder: Path) -> Any:
    with launched():
        run = Run(kind, to)
        losses, found = run.train(folder), dict[int, Any]()
        run.accelerator.load_state(f"{folder}/{AT[0]}")  # back, in the same process
        found[AT[0]] = run.ranks.last_step, run.train()
    for at in AT[1:]:
        with launched():
            run = Run(kind, to, seed=9)
            run.accelerator.load_state(f"{folder}/{at}")
            found[at] = run.ranks.last_step, run.train()
    return losses, found


@pytest.mark.parametrize(
    ("kind", "to"), [("ddp", "adapted"), ("fsdp2", "adapted"), ("fsdp2", "low-rank")]
)
def test_two_processes_equal_one(processes: Pools, tmp_path: Path, kind: str, to: str) -> None:
    expected = plain_losses(to)
    for losses, found in processes(2)(trained, kind, to, tmp_path):
        assert losses == pytest.approx(expected, abs=1e-5)
        for at, (step, rest) in found.items():
            assert step == at and rest == losses[at:]


def named_by_accelerate(folder: Path) -> Any:
    """FSDP2 with bf16, whose last checkpoint has a number of two digits."""
    with launched():
        run = Run("fsdp2", "adapted", precision="bf16")
        config = run.accelerator.project_configuration
        config.set_directories(str(folder))
        config.automatic_checkpoint_naming = True
        losses = run.train(end=15)
        for _ in range(10):
            run.accelerator.save_state()
        losses += run.train(end=16)
        run.accelerator.save_state()
        losses += run.train()
        run.accelerator.load_state()
        step, rest = run.ranks.last_step, run.train()
        whole = run.accelerator.get_state_dict(run.model)
        fresh = mlp(9)
        dr.apply_plan(fresh, dr.current_plan(run.model))
        fresh.load_state_dict(whole, strict=dist.get_rank() == 0)
        inputs = batches(1)[0][0]
        error = (run.model(inputs) - fresh(inputs)).abs().max().item()
        return losses, step, rest, error if dist.get_rank() == 0 else 0.0


def test_fsdp2_with_bf16_resumes_the_last_checkpoint(processes: Pools, tmp_path: Path) -> None:
    for losses, step, rest, error in processes(2)(named_by_accelerate, tmp_path):
        assert step == 16 and rest == losses[16:]
        assert error < 0.01  # of bf16


def made_before() -> list[float]:
    with launched():
        return Run("fsdp2", "adapted", before=True).train()


def test_a_rank_scheduler_may_be_made_before_fsdp2(processes: Pools) -> None:
    for losses in processes(2)(made_before):
        assert losses == pytest.approx(plain_losses(), abs=1e-5)


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except BaseException as error:  # torch's CheckpointException is none of Exception
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(folder: Path) -> tuple[list[str], bool]:
    with launched():
        run = Run("fsdp2", "adapted")
        run.train(end=4)
        run.accelerator.save_state(str(folder / "4"))
        run.train(end=18)
        before = dr.current_plan(run.model), run.optimizer.state_dict()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "4" / "optimizer_0")
        dist.barrier()
        found = [said(lambda: run.accelerator.load_state(folder / "4"))]
        assert run.ranks.last_step == 18 and dr.current_plan(run.model) == before[0]
        assert all(p.requires_grad for n, p in run.model.named_parameters() if "base" not in n)
        same = str(run.optimizer.state_dict()) == str(before[1])
        run.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        found.append(said(lambda: attach(run.accelerator, run.ranks)))
        found.append(said(lambda: run.accelerator.save_state(str(folder / "full"))))
        found.append(said(lambda: run.accelerator.load_state(folder / "4")))
        run.handle.remove()
        assert "load_state" not in vars(run.accelerator)
    with launched():
        accelerator, model = accelerator_of("fsdp2"), mlp()
        found.append(said(lambda: attach(accelerator, ranks_of(model, adamw(model)))))
    return found, same


def test_what_cannot_be_saved_or_loaded_changes_nothing(processes: Pools, tmp_path: Path) -> None:
    for (lost, *full, early), same in processes(2)(refusals, tmp_path):
        assert same and "Exception" in lost
        assert all("ValueError" in one and "FULL_STATE_DICT" in one for one in full)
        assert "the order is accelerator.prepare" in early


def test_two_processes_of_accelerate_launch() -> None:
    """The example compares its losses with a plain loop's, and with those after a resume."""
    example = Path(__file__).parents[2] / "examples/14_accelerate.py"
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    options += " --dynamo_backend no --main_process_port 0"  # torch chooses the port
    words = ["-m", "accelerate.commands.launch", *options.split(), example, "--epochs", "3"]
    done = python(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "the other 14 are the same" in done.stdout
