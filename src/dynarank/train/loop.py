"""The training loop behind ``dynarank train``: a plain loop and one rank scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from dynarank.cost import ModelUse, trace
from dynarank.forms import Change
from dynarank.measure import default_cache, measure, where_faster
from dynarank.planning import cost_schedule
from dynarank.probe import probe_memory
from dynarank.scheduler import RankScheduler
from dynarank.schedules import Readings, Schedule, timeline
from dynarank.selection import select
from dynarank.train.batches import Batches
from dynarank.train.data import ImageData
from dynarank.train.models import MODELS, published_init_
from dynarank.train.recipes import Recipe

__all__ = ["DivergedError", "EpochResult", "Machine", "Trainer"]

_TEST_BATCH = 1000


class DivergedError(RuntimeError):
    """The loss is not finite any more."""


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes.

    Args:
        device: the device of model and data.
        precision: ``"bf16"`` runs the forward pass under bf16 autocast (parameters stay fp32).
        compile: whether to compile the model; it is compiled again after each change of form.
        measure: whether to time every layer's forms first, and to leave those full-rank that are
            not faster low-rank here.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    measure: bool = False

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class EpochResult:
    """An epoch's figures: mean training loss and accuracy, and those of the test set."""

    learning_rate: float
    train_loss: float
    train_score: float
    test_loss: float
    test_score: float


class Trainer:
    """One run: a recipe under one schedule.

    Args:
        recipe: what to train.
        schedule: the schedule's name.
        data: the images, on the machine's device.
        seed: of initial weights, order and augmentation: equal for all schedules.
        epochs: the run's length; the recipe's moments keep their share of it.
        machine: where and how.
        on_phase: called with the peak memory in bytes after the first step of each phase, its
            gradients still there.
        on_step: called after each optimizer step with the changes of form that followed it.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: str,
        data: ImageData,
        *,
        seed: int,
        epochs: int,
        machine: Machine,
        on_phase: Callable[[int], None] = lambda peak_bytes: None,
        on_step: Callable[[list[Change]], None] = lambda changes: None,
    ) -> None:
        self.recipe, self.data, self.machine = recipe, data, machine
        self.on_phase, self.on_step = on_phase, on_step
        self.batches = Batches(
            data.train_images,
            data.train_labels,
            recipe.batch_size,
            seed=seed,
            shuffle=recipe.shuffle,
            augment=recipe.augment,
            memory_format=torch.channels_last,
        )
        self.epochs, self.total_steps = epochs, epochs * len(self.batches)
        torch.manual_seed(seed)
        model = MODELS[recipe.model](data.classes).to(machine.device)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._build(recipe.schedule(schedule))
        if recipe.init == "published":
            published_init_(self.model.parameters(), seed)
        if machine.compile:
            self.model.compile()
        self.done = 0
        self.train_seconds = 0.0

    def _build(self, schedule: Schedule) -> None:
        """The optimizer, the two schedulers, and the cost of the run as predicted."""
        recipe = self.recipe
        self.optimizer = torch.optim.SGD(
            _decay_groups(self.model, recipe.weight_decay),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        milestones = [round(recipe.share(epoch) * self.total_steps) for epoch in recipe.decay_at]
        self.lr_scheduler = MultiStepLR(self.optimizer, milestones, recipe.decay_factor)
        layers = [site.path for site in select(self.model, recipe.layers)]
        use = trace(self.model, self.data.train_images[: recipe.batch_size])
        if self.machine.measure:
            schedule = self._where_faster(schedule, use, layers)
        self.cost = cost_schedule(use, schedule, layers, self.total_steps)
        self.ranks = RankScheduler(
            self.model,
            self.optimizer,
            schedule,
            self.total_steps,
            layers=recipe.layers,
            moments=recipe.moments,
        )

    def _where_faster(self, schedule: Schedule, use: ModelUse, layers: list[str]) -> Schedule:
        """The schedule with low rank only where this machine is faster at it."""
        readings = Readings({path: use.layers[path].spec.unit_shape for path in layers})
        plans = [phase.plan for phase in timeline(schedule, readings, self.total_steps)]
        timings = measure(
            use,
            plans,
            device=self.machine.device,
            autocast=torch.bfloat16 if self.machine.precision == "bf16" else None,
            channels_last=True,
            cache=default_cache(),
        )
        return where_faster(schedule, timings)

    @property
    def epochs_done(self) -> float:
        """Fractional epochs."""
        return self.done / len(self.batches)

    def train_epoch(self, epoch: int) -> EpochResult:
        """One pass over the training set, and a test.

        Raises:
            DivergedError: the training loss is not finite.
        """
        self.model.train()
        begun = time.perf_counter()
        rate = float(self.optimizer.param_groups[0]["lr"])
        loss_sum = torch.zeros((), device=self.machine.device)
        correct = torch.zeros((), device=self.machine.device, dtype=torch.long)
        for images, labels in self.batches.epoch(epoch):
            loss, output = self._step(images, labels)
            loss_sum += loss
            correct += (output.argmax(1) == labels).sum()
        train_loss = loss_sum.item() / len(self.batches)  # waits for the device
        self.train_seconds += time.perf_counter() - begun
        if not math.isfinite(train_loss):
            raise DivergedError(
                f"the training loss of epoch {epoch + 1} is {train_loss} at learning rate {rate}; "
                "try a lower one"
            )
        seen = len(self.batches) * self.recipe.batch_size
        return EpochResult(rate, train_loss, correct.item() / seen, *self.evaluate())

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step; the first of a phase is measured as well."""
        first = any(cost.phase.start == self.done for cost in self.cost.phases)
        measure = probe_memory(self.model, [self.optimizer], self.machine.device) if first else None
        with measure or nullcontext() as probe:
            with self.machine.autocast():
                output = self.model(images)
                loss = F.cross_entropy(output, labels, label_smoothing=self.recipe.label_smoothing)
            loss.backward()
            self.optimizer.step()
        if probe is not None:
            self.on_phase(probe.peak_bytes)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.done += 1
        self.on_step(self.ranks.step())
        return loss.detach(), output.detach()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss (without label smoothing) and accuracy on the test set."""
        self.model.eval()
        images, labels = self.data.test_images, self.data.test_labels
        loss = torch.zeros((), device=self.machine.device)
        correct = torch.zeros((), device=self.machine.device, dtype=torch.long)
        for x, y in zip(images.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True):
            with self.machine.autocast():
                output = self.model(x.contiguous(memory_format=torch.channels_last)).float()
            loss += F.cross_entropy(output, y, reduction="sum")
            correct += (output.argmax(1) == y).sum()
        return loss.item() / len(labels), correct.item() / len(labels)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights (and, later, their factors) decay; normalisations and biases do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
