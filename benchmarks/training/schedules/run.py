"""Train networks under schedules and append one JSON line a run.

Arms of a seed have the same initial network and batches and run one after another, seed by seed, so
that their CPU seconds compare. FLOPs are those executed, of the whole model, relative to full rank;
calibration and cuts are in the seconds, not in the FLOPs.

python benchmarks/training/schedules/run.py fash lm2 --data DIR --seeds 0 1 2 3 4 --out runs.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm
from problems import PROBLEMS, Problem

import dynarank as dr
from dynarank.cost import trace
from dynarank.recording.host import commit, hardware
from dynarank.schedules import schedule_to_data
from dynarank.train.ledger import Ledger


def train(problem: Problem, arm: Arm, seed: int) -> dict[str, Any]:
    """Train once; costs and the test's results."""
    model = problem.model(seed).train()
    rate = arm.rate * problem.rate
    optimizer = problem.optimizer(model, rate)
    use = trace(model, problem.batch(seed, 0)[0])
    begun = time.process_time()
    ranks = dr.RankScheduler(
        model, optimizer, arm.schedule, problem.steps, layers=problem.layers,
        batches=lambda: problem.inputs(seed),
    )  # fmt: skip
    ledger = Ledger(use, dr.current_plan(model))
    for step in range(problem.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * problem.factor(step)
        problem.loss(model, problem.batch(seed, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ledger.step()
        if ranks.step():
            ledger.turn(dr.current_plan(model))
    seconds = time.process_time() - begun
    ranks.close()
    return {
        "flops": ledger.relative_flops, "end_flops": ledger.last_relative_step,
        "cpu_seconds": seconds, **problem.test(model),
    }  # fmt: skip


def main() -> None:
    """Run the arms of each problem, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="+", choices=list(PROBLEMS))
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", help="names of arms; default: all of the problem")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = {
        "commit": commit(), "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    for name in given.problems:
        problem = PROBLEMS[name](given.data)
        precision = "bf16 autocast" if problem.bf16 else "fp32"
        arms = [arm for arm in ARMS[name] if given.arms is None or arm.name in given.arms]
        for seed in given.seeds:
            for arm in arms:
                found = train(problem, arm, seed)
                line = {
                    "problem": name, "arm": arm.name, "seed": seed, "rate": arm.rate, **found,
                    "schedule": schedule_to_data(arm.schedule), "precision": precision, **place,
                }  # fmt: skip
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print({k: line[k] for k in ("problem", "arm", "seed", *found)}, flush=True)


if __name__ == "__main__":
    main()
