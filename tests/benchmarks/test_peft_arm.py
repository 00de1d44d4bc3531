"""LoRA by PEFT: what trains, and that its FLOPs are counted as everyone's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from made_up_glue import write_encoder, write_rte

from benchmarks.training.harness import arms
from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.harness.trial import Trial
from benchmarks.training.peft_arm import peft_lora
from benchmarks.training.problems.encoder import TunedRTE
from benchmarks.training.problems.problem import Problem
from dynarank.schedules import lora, low_rank

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

PEFT = peft_lora(4)
ARMS = [
    Arm("full rank", None),
    PEFT,
    Arm("adapted", lora(4)),
    Arm("low", low_rank(16)),
]


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Problem:
    folder = tmp_path_factory.mktemp("data")
    write_encoder(folder)
    write_rte(folder)
    return TunedRTE(folder, rows=36, valid=20)


def trial(problem: Problem, arm: Arm) -> Trial:
    every = {one.name: one for one in (*arms.full_rank(), arm)}
    experiment = Experiment("pairs", lambda data: problem, [*every.values()], points=1)
    return Trial(experiment, problem, arm, Setting(8.0), 0, arm.schedule)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_the_flops_of_every_arm_are_those_of_the_counter(problem, arm):
    run = trial(problem, arm)
    with FlopCounterMode(display=False) as counter:
        problem.training_loss(run.model, problem.batch(0, 0)).backward()
    run.model.zero_grad()
    run.step()
    assert run.ledger.training_flops == counter.get_total_flops()
    run.close()


def test_only_adapters_and_the_head_train(problem):
    model = trial(problem, PEFT).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"scale", "threshold"}
    assert len(trained) == 2 + 2 * 2 * 6  # up and down of six layers in each of two blocks


def test_adapters_start_at_the_pretrained_function(problem):
    inputs, _ = problem.batch(0, 0)
    plain, adapted = problem.model(0), trial(problem, PEFT).model
    with torch.no_grad():
        assert torch.equal(problem.outputs(plain, inputs), problem.outputs(adapted, inputs))


def test_a_run_goes_on_from_its_checkpoint(problem, tmp_path: Path):
    whole, first = trial(problem, PEFT), trial(problem, PEFT)
    first.step()
    first._save(tmp_path / "run")
    rest = trial(problem, PEFT)
    rest._load(tmp_path / "run")
    while whole.seen["step"] < problem.steps:
        whole.step()
    rest.run(tmp_path / "run2")
    expected, found = whole.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rest.relative_flops == whole.relative_flops
