"""What does activation-aware truncation gain over plain truncation, with uniform or chosen ranks?

A network is trained at full rank to five sixths of its recipe (10 of 12 epochs of CIFAR-10, 25 of
30 of the digits); then each arm deflates a copy of it to low-rank, is tested, trains a little more,
and is tested again. Arms with the same share have the same FLOP budget, that of the uniform ranks:

- plain: the truncated SVD of each weight, uniform ranks;
- activation-aware: the outputs' principal directions on 512 training images, uniform ranks;
- budgeted: the same, with the ranks of ``plan_within(flops=...)``;
- budgeted-plain: ranks of ``plan_within`` without a calibration, plain truncation.

python benchmarks/training/studies/low_rank_ending.py digits --seeds 0 1 2 --out FILE
python benchmarks/training/studies/low_rank_ending.py cifar10-resnet20 --data DIR --out FILE
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

import dynarank as dr
from dynarank.cost.flops import trace
from dynarank.forms import Rank
from dynarank.recording.host import commit, hardware
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.data import ImageData, limit, load_cifar10, load_digits_data
from dynarank.train.images import ImageTask
from dynarank.train.loop import Machine, Trainer
from dynarank.train.recipes import Recipe, load_recipe

SHARES = (1 / 8, 1 / 4, 1 / 2)
ARMS = ("plain", "activation-aware", "budgeted", "budgeted-plain")
CALIBRATION_IMAGES = 512


def settings(name: str, folder: str | None) -> tuple[Recipe, ImageData, int, int, int]:
    """Recipe, data, epochs of the whole run, epochs before the deflation, steps after it."""
    recipe = load_recipe(name)
    if name == "digits":
        return recipe, load_digits_data(), 30, 25, 44
    data = limit(load_cifar10(folder), 5000)
    recipe = recipe.model_copy(update={"batch_size": 64, "augment": False})
    small = replace(
        data,
        train_images=F.avg_pool2d(data.train_images, 2),
        test_images=F.avg_pool2d(data.test_images[:2000], 2),
        test_labels=data.test_labels[:2000],
    )
    return recipe, small, 12, 10, 20


def plan_of(arm: str, share: float, model: nn.Module, recipe: Recipe, data: ImageData,
            calibration: Any) -> dict[str, Any]:  # fmt: skip
    """The arm's plan; budgeted ones cost no more than the uniform one of the same share."""
    paths = [site.path for site in select(survey(model), recipe.layers)]
    uniform = {path: dr.LowRank(Rank(share, of="out")) for path in paths}
    if not arm.startswith("budgeted"):
        return uniform
    sample = data.train_images[: recipe.batch_size]
    budget = trace(model, sample).flops(uniform).training
    known = calibration if arm == "budgeted" else None
    return dr.plan_within(
        model, sample, flops=budget, calibration=known, multiple_of=1, layers=recipe.layers
    )


def tested(trainer: Trainer) -> tuple[float, float]:
    """Loss and accuracy of the test set."""
    found = trainer.evaluate()
    return found.loss, found.scores["accuracy"]


def run(arm: str, share: float, trainer: Trainer, further: int, epoch: int) -> dict[str, Any]:
    """Deflate a copy of the trained network, test, train further, test."""
    trainer = copy.deepcopy(trainer)
    task, model, recipe = cast(ImageTask, trainer.task), trainer.model, trainer.recipe
    data = task.data
    images = data.train_images[:CALIBRATION_IMAGES].split(128)
    calibration = dr.calibrate(model, images, layers=recipe.layers)
    plan = plan_of(arm, share, model, recipe, data, calibration)
    use = trace(model, data.train_images[: recipe.batch_size])
    changes = dr.apply_plan(
        model, plan, optimizer=trainer.optimizer,
        calibration=calibration if arm in ("activation-aware", "budgeted") else None,
    )  # fmt: skip
    after = tested(trainer)
    model.train()
    for step, (x, y) in enumerate(task.batches.epoch(epoch)):
        if step == further:
            break
        F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    later = tested(trainer)
    ranks = {p: getattr(f, "rank", "full") for p, f in dr.current_plan(model).items() if p in plan}
    return {
        "arm": arm, "share": share, "ranks": ranks,
        "relative_flops": use.flops(plan).training / use.flops({}).training,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_error": sum(c.error for c in changes) / max(len(changes), 1),
        "loss_after": after[0], "accuracy_after": after[1],
        "loss_further": later[0], "accuracy_further": later[1],
    }  # fmt: skip


def trained(recipe: Recipe, data: ImageData, seed: int, epochs: int, before: int,
            start: Path | None) -> Trainer:  # fmt: skip
    """The network at the deflation, trained here or read from a file."""
    small = replace(data, test_images=data.test_images[:500], test_labels=data.test_labels[:500])
    machine = Machine(torch.device("cpu"), "fp32")
    task = ImageTask(recipe, small, seed=seed)
    trainer = Trainer(recipe, "full-rank", task, seed=seed, epochs=epochs, machine=machine)
    if start is not None and start.exists():
        saved = torch.load(start)
        trainer.model.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
    else:
        for epoch in range(before):
            trainer.train_epoch(epoch)
    task.data = data
    return trainer


def main() -> None:
    """Run every arm for every seed and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=["digits", "cifar10-resnet20"])
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", type=Path, help="folder of RECIPE-seedN.pt trained before")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe, data, epochs, before, further = settings(given.recipe, given.data)
    header = {
        "recipe": recipe.model_dump(mode="json"), "epochs": epochs, "deflated_after": before,
        "further_steps": further, "train_images": len(data.train_labels),
        "test_images": len(data.test_labels), "image_shape": list(data.train_images.shape[1:]),
        "calibration_images": CALIBRATION_IMAGES, "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
    }  # fmt: skip
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        start = given.starts and given.starts / f"{given.recipe}-seed{seed}.pt"
        trainer = trained(recipe, data, seed, epochs, before, start)
        loss, accuracy = tested(trainer)
        runs.append({"seed": seed, "arm": "full-rank", "loss_after": loss,
                     "accuracy_after": accuracy})  # fmt: skip
        for share in SHARES:
            for arm in ARMS:
                runs.append({"seed": seed, **run(arm, share, trainer, further, before)})
                print(seed, arm, share, {k: round(v, 4) for k, v in runs[-1].items()
                                         if isinstance(v, float)}, flush=True)  # fmt: skip
    given.out.write_text(json.dumps({**header, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
