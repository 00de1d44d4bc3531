"""Do LR re-warm-up and BatchNorm recalibration help right after a change of form?

Each arm is a whole run of a recipe with the same seeds, under dynamic rank aligned with the
learning rate. Tested right before and right after the deflation, 20 and 50 steps later, and at the
end.

- ``adapted`` and ``low-rank``: the form after the deflation;
- ``re-warm-up N``: the learning rate rises from 1/N to 1 over the N steps after each change;
- ``recalibration``: after the truncation, running statistics are recomputed on 512 training images.

python benchmarks/training/studies/after_a_change.py digits --epochs 15 \
    --seeds 0 1 2 3 4 --out FILE
python benchmarks/training/studies/after_a_change.py fashion-mnist-resnet8 --data DIR \
    --epochs 4 --train-limit 2000 --test-limit 1000 --seeds 0 1 --out FILE
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dynarank import BatchNormRecalibration, LRRewarmup, RankScheduler
from dynarank.forms import FullRank
from dynarank.recording.host import commit, hardware
from dynarank.schedules import dynamic_rank
from dynarank.train.optimizers import make_optimizer
from dynarank.train.rates import forecast_rates, make_lr_scheduler
from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.task import Task
from dynarank.train.tasks import make_task

ARMS: dict[str, dict[str, Any]] = {
    "adapted": {"to": "adapted"},
    "adapted, re-warm-up 20": {"to": "adapted", "rewarmup": 20},
    "low-rank": {"to": "low-rank"},
    "low-rank, re-warm-up 20": {"to": "low-rank", "rewarmup": 20},
    "low-rank, recalibration": {"to": "low-rank", "recalibrate": True},
    "low-rank, recalibration, re-warm-up 20": {
        "to": "low-rank", "recalibrate": True, "rewarmup": 20,
    },
}  # fmt: skip
AFTER = (0, 20, 50)
IMAGES = 512


def run(recipe: Recipe, task: Task, epochs: int, seed: int, to: str, rewarmup: int = 0,
        recalibrate: bool = False) -> dict[str, Any]:  # fmt: skip
    """Train once; test losses and scores by steps since the deflation, and at the end."""
    torch.manual_seed(seed)
    model, total = task.model(), epochs * task.steps_per_epoch
    optimizer = make_optimizer(recipe, model)
    lr_scheduler = make_lr_scheduler(recipe, optimizer, total)
    batches = -(-IMAGES // recipe.batch_size)

    def images() -> list[torch.Tensor]:
        epoch = task.epoch(0)
        return [next(epoch)[0] for _ in range(batches)]

    callbacks = [LRRewarmup(rewarmup), *([BatchNormRecalibration(images)] if recalibrate else [])]
    ranks = RankScheduler(
        model, optimizer, dynamic_rank(recipe.rank, to=to), total, layers=recipe.layers,
        lr_scheduler=forecast_rates(recipe), callbacks=callbacks,
    )  # fmt: skip
    tested: dict[str, tuple[float, float]] = {}

    def test(name: str) -> None:
        model.eval()
        with torch.no_grad():
            found = task.evaluate(model, nullcontext)
        model.train()
        tested[name] = found.loss, next(iter(found.scores.values()))

    model.train()
    step, deflated, full = 0, None, False
    deflation = ranks.phases()[-1].start
    for epoch in range(epochs):
        for batch in task.epoch(epoch):
            loss, _ = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            step += 1
            if step == deflation:
                test("before")
            changes = ranks.step()
            full |= any(isinstance(change.after, FullRank) for change in changes)
            if full and changes and not isinstance(changes[0].after, FullRank):
                deflated = step
            if deflated is not None and step - deflated in AFTER:
                test(str(step - deflated))
    test("end")
    return {name: {"loss": loss, "score": score} for name, (loss, score) in tested.items()}


def main() -> None:
    """Run every arm for every seed and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe, cpu = load_recipe(given.recipe), torch.device("cpu")
    epochs = given.epochs or recipe.epochs
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        task = make_task(recipe, given.data, seed=seed, device=cpu, train_limit=given.train_limit,
                         test_limit=given.test_limit)  # fmt: skip
        for arm, options in ARMS.items():
            runs.append({"seed": seed, "arm": arm, **run(recipe, task, epochs, seed, **options)})
            print(seed, arm, runs[-1]["0"], runs[-1]["end"], flush=True)
    header = {
        "recipe": recipe.model_dump(mode="json"), "epochs": epochs,
        "train_limit": given.train_limit, "test_limit": given.test_limit,
        "hardware": hardware(cpu), "commit": commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    given.out.write_text(json.dumps({**header, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
