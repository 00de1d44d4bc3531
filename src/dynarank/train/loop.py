"""The training loop of ``dynarank train``: a plain loop with one rank scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.random_states import random_states, set_random_states
from dynarank.checkpoint.snapshot import restore, take
from dynarank.cost.flops import trace
from dynarank.cost.memory import probe_memory
from dynarank.cost.schedule import ScheduleCost, cost_schedule
from dynarank.cost.timing import default_cache, measure, where_faster
from dynarank.distributed.processes import Processes, independent
from dynarank.forms import Change, FullRank, Plan, Request, Within, form_name
from dynarank.recording.events import gradient_bytes
from dynarank.scheduler.batch_norm import BatchNormRecalibration
from dynarank.scheduler.callbacks import Callback
from dynarank.scheduler.lr_rewarmup import LRRewarmup
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.schedules.base import RankSchedule, Readings
from dynarank.schedules.timelines import timeline
from dynarank.surgery.selection import select
from dynarank.surgery.sites import current_plan, survey
from dynarank.train.global_batch_norm import GlobalBatchNorm
from dynarank.train.init import published_init_
from dynarank.train.ledger import Ledger
from dynarank.train.optimizers import make_optimizer, optimizer_slots
from dynarank.train.own_draws import seed_generators
from dynarank.train.rates import forecast_rates, make_lr_scheduler
from dynarank.train.recipe import Recipe
from dynarank.train.same_buffers import check_buffers
from dynarank.train.schedules import make_schedule, with_default_layers
from dynarank.train.shares import Shares
from dynarank.train.task import Evaluation, Task

__all__ = ["DivergedError", "EpochResult", "Machine", "Trainer", "calibration_batches"]


_ALONE = Processes()
_CALIBRATED_ON = 512  # examples for cuts and for BatchNorm recalibration


def calibration_batches(batch_size: int) -> int:
    """How many batches pass through the network before a cut that is measured on batches."""
    return -(-_CALIBRATED_ON // batch_size)


class DivergedError(RuntimeError):
    """Raised when the training loss is no longer finite."""


@dataclass(frozen=True)
class Machine:
    """The device and execution options of a run.

    Args:
        device: the device of model and data.
        precision: ``"bf16"`` runs the forward pass under bf16 autocast (parameters stay fp32).
        compile: whether to compile the model; it is recompiled after each change of form.
        measure: whether to time the forms of every layer first, and keep those layers full-rank
            that are not faster at low rank on this machine.
        noise: whether to measure the gradient noise scale after each epoch.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    measure: bool = False
    noise: bool = False

    def autocast(self) -> Any:
        """The autocast context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class EpochResult:
    """The results of an epoch: mean training loss and score, test loss and test score.

    ``scores`` are the test scores of the other metrics.
    """

    learning_rate: float
    train_loss: float
    train_score: float | None
    test_loss: float
    test_score: float
    scores: dict[str, float]


@dataclass
class _Sums:
    """What an epoch has summed up: its first learning rate, losses and scores."""

    learning_rate: float
    losses: Tensor
    scores: Tensor | None = None

    def add(self, loss: Tensor, score: Tensor | None) -> None:
        self.losses = self.losses + loss
        if score is not None:
            self.scores = score if self.scores is None else self.scores + score

    def read(self) -> tuple[float, float | None]:
        """The values; waits for the device."""
        return self.losses.item(), None if self.scores is None else self.scores.item()

    def on(self, device: torch.device) -> _Sums:
        scores = None if self.scores is None else self.scores.to(device)
        return _Sums(self.learning_rate, self.losses.to(device), scores)


class Trainer:
    """Trains a recipe under one schedule.

    Args:
        recipe: the recipe to train.
        schedule: the name of the schedule.
        task: the recipe's data, on the machine's device.
        seed: the seed of the initial weights, which are the same for all schedules.
        epochs: the length of the run; times in the recipe are scaled to it.
        machine: the device and execution options.
        on_phase: called after the first step of each phase, while its gradients still exist, with
            the peak memory in bytes.
        on_step: called after each optimizer step with the changes of form that followed it.
        processes: those that train together, each on its share of every batch. Their losses are
            those of one process; BatchNorm takes the statistics of a share, and dropout draws by
            process.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: str,
        task: Task,
        *,
        seed: int,
        epochs: int,
        machine: Machine,
        on_phase: Callable[[int], None] = lambda peak_bytes: None,
        on_step: Callable[[list[Change]], None] = lambda changes: None,
        processes: Processes = _ALONE,
    ) -> None:
        self.task, self.machine, self.processes = task, machine, processes
        self.seed = seed
        self.on_phase, self.on_step = on_phase, on_step
        self.epochs, self.total_steps = epochs, epochs * task.steps_per_epoch
        torch.manual_seed(seed)
        self.model = task.model()
        size = recipe.batch_size or len(tree_leaves(task.sample())[0])  # that of a loader
        recipe = with_default_layers(recipe, self.model).model_copy(update={"batch_size": size})
        self.recipe = recipe
        self._shares = Shares(task, processes, size) if processes.size > 1 else None
        self._build(schedule)
        if recipe.init == "published":
            published_init_(self.model.parameters(), seed)
        if machine.compile:
            self.model.compile()
        self._replica: DistributedDataParallel | None = None
        self.processes_before = processes.size  # of the run that goes on
        self._states: list[Any] = []  # of all processes, what is not the same in them
        if processes.rank:
            self._seed(0)
        self.done = 0
        self.train_seconds = 0.0
        self._begun: float | None = None  # when the time that was not counted yet began
        self._new_phase = True
        self._sums = self._no_sums()

    def _build(self, name: str) -> None:
        """Create the optimizer, both schedulers and the predicted cost of the run."""
        recipe = self.recipe
        self.optimizer = make_optimizer(recipe, self.model)
        self.lr_scheduler = make_lr_scheduler(recipe, self.optimizer, self.total_steps)
        layers = [site.path for site in select(survey(self.model), recipe.layers)]
        with independent():
            self.use = trace(self.model, self.task.sample())
            schedule = make_schedule(
                recipe,
                name,
                self.model,
                self.task.sample(),
                self.total_steps,
                self.optimizer,
                measure=self.machine.measure,
            )
        if self.machine.measure:
            schedule = self._where_faster(schedule, layers)
        self.ranks = RankScheduler(
            self.model,
            self.optimizer,
            schedule,
            self.total_steps,
            layers=recipe.layers,
            lr_scheduler=forecast_rates(recipe, self.total_steps),
            moments=schedule.moments or recipe.moments,
            batches=self._inputs if (budgets := self._has_budgets(schedule, layers)) else None,
            callbacks=self._callbacks(schedule, recalibrate=not budgets),
        )
        self.plan = current_plan(self.model)
        self.ledger = Ledger(self.use, self.plan, self.all_reduced_bytes_per_step)

    def _has_budgets(self, schedule: RankSchedule, layers: list[str]) -> bool:
        """Whether ranks are found for budgets in the run; then every cut is made on batches."""
        requests = self._requests(schedule, layers)
        return any(isinstance(one, Within) for request in requests for one in request.values())

    def _callbacks(self, schedule: RankSchedule, *, recalibrate: bool) -> list[Callback]:
        """The callbacks of the rank scheduler that the schedule or the recipe asks for."""
        rewarmup = self.recipe.rewarmup if schedule.rewarmup is None else schedule.rewarmup
        callbacks: list[Callback] = [LRRewarmup(rewarmup)]
        if self.recipe.recalibrate_batch_norms and recalibrate:
            callbacks.append(BatchNormRecalibration(self._inputs))
        return callbacks

    def _inputs(self) -> Iterator[Any]:
        """The inputs of some batches, on which layers are cut."""
        count = calibration_batches(self.recipe.batch_size)
        return (self.task.inputs(batch) for batch in islice(self.task.epoch(0), count))

    def _where_faster(self, schedule: RankSchedule, layers: list[str]) -> RankSchedule:
        """The schedule with low-rank forms only where they are faster on this machine."""
        plans = [_forms_of(request) for request in self._requests(schedule, layers)]
        timings = self.processes.by_first(
            "the times of layers",
            lambda: measure(
                self.use,
                plans,
                device=self.machine.device,
                autocast=torch.bfloat16 if self.machine.precision == "bf16" else None,
                channels_last=True,
                cache=default_cache(),
            ),
        )
        return where_faster(schedule, timings)

    def _requests(self, schedule: RankSchedule, layers: list[str]) -> list[Request]:
        """What the schedule answers over the run, as far as it is known in advance."""
        shapes = {path: self.use.layers[path].spec.unit_shape for path in layers}
        readings = Readings(shapes, forecast=forecast_rates(self.recipe, self.total_steps))
        return [phase.plan for phase in timeline(schedule, readings, self.total_steps)]

    @property
    def epochs_done(self) -> float:
        """The number of epochs done, a fraction."""
        return self.done / self.task.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def phase(self) -> str:
        """The form that all scheduled layers have, or ``mixed``."""
        names = {form_name(self.plan[path]) for path in self.ranks.layers}
        return next(iter(names)) if len(names) == 1 else "mixed"

    @property
    def share_full_rank(self) -> float:
        """The share of the scheduled layers that are full-rank, by number."""
        full = [isinstance(self.plan[path], FullRank) for path in self.ranks.layers]
        return sum(full) / len(full)

    def forecast(self) -> ScheduleCost:
        """The predicted cost of the run, as far as its schedule is known in advance."""
        return cost_schedule(
            self.use,
            self.ranks.schedule,
            self.ranks.layers,
            self.total_steps,
            optimizer_slots=optimizer_slots(self.recipe),
            forecast=forecast_rates(self.recipe, self.total_steps),
        )

    def train_epoch(self, epoch: int) -> EpochResult:
        """Train for one epoch, or what is left of it, then evaluate on the test set.

        Raises:
            DivergedError: the training loss is not finite.
        """
        self.model.train()
        steps = self.task.steps_per_epoch
        if not (start := self.done - epoch * steps):
            self._sums = self._no_sums()
        self._begun = time.perf_counter()
        batches = self.task.epoch(epoch, start)
        for batch in batches if self._shares is None else self._shares.agreed(batches):
            self.on_step(self._step(batch))
        rate = self._sums.learning_rate
        losses, scores = self._summed()
        train_loss = losses / steps
        self._count_seconds()
        self._begun = None
        if not math.isfinite(train_loss):
            raise DivergedError(
                f"the training loss of epoch {epoch + 1} is {train_loss} at learning rate {rate}; "
                "try a lower learning rate"
            )
        train_score = None if scores is None else scores / steps
        found = self.evaluate()
        others = {k: v for k, v in found.scores.items() if k != self.task.metric.name}
        score = found.scores[self.task.metric.name]
        return EpochResult(rate, train_loss, train_score, found.loss, score, others)

    def _count_seconds(self) -> None:
        if self._begun is not None:
            now = time.perf_counter()
            self.train_seconds += now - self._begun
            self._begun = now

    def _step(self, batch: Any) -> list[Change]:
        """Run one optimizer step; in the first step of a phase, measure its peak memory."""
        first, self._new_phase = self._new_phase, False
        measure = probe_memory(self.model, [self.optimizer], self.machine.device) if first else None
        with measure or nullcontext() as probe:
            loss, score = self._backward(batch)
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
        if probe is not None:
            self.on_phase(max(self.processes.gather("the peak memory", probe.peak_bytes)))
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        self.done += 1
        self.ledger.step()
        self._sums.add(loss.detach(), score)
        return self._change()

    def _backward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The gradients of the mean loss of a batch; of loss and score, this process's part."""
        if self._shares is None:
            with self.machine.autocast():
                loss, score = self.task.loss(self.model, batch)
            loss.backward()
            return loss, score
        share, first = self._shares.of(self.model, batch), self._replica is None
        whole = GlobalBatchNorm(self.processes.group, counts=share.of_loss > 0)
        with self.machine.autocast(), whole:
            loss, score = self.task.loss(self._replicated(), share.batch)
        (loss * (share.of_loss * self.processes.size)).backward()
        if first:
            check_buffers(self.model, self.processes)
        return loss * share.of_loss, None if score is None else score * share.of_score

    def _replicated(self) -> DistributedDataParallel:
        """The model in DDP: made at the first step, when the model has the forms that it needs."""
        if self._replica is None:
            device = self.machine.device
            self._replica = DistributedDataParallel(
                self.model,
                device_ids=None if device.type == "cpu" else [device],
                process_group=self.processes.group,
                find_unused_parameters=True,  # a network may leave out some in any step
            )
        return self._replica

    @property
    def all_reduced_bytes_per_step(self) -> int:
        """What a process gives to each averaging of gradients: a step has one."""
        return 0 if self.processes.size == 1 else gradient_bytes(self.model)

    def _no_sums(self) -> _Sums:
        return _Sums(self.learning_rate, torch.zeros((), device=self.machine.device))

    def _summed(self) -> tuple[float, float | None]:
        """The sums of losses and scores over the epoch and all processes."""
        mine = self._sums.read()
        found = self.processes.gather("the losses of an epoch", mine)
        losses, all_scores = zip(*found, strict=True)
        # A process that came after the last step has summed up nothing.
        scores = [score for score in all_scores if score is not None]
        return math.fsum(losses), math.fsum(scores) if scores else None

    def _change(self) -> list[Change]:
        """Step the rank scheduler; a change of form starts a new phase."""
        changes = self.ranks.step()
        if changes:
            self._new_phase = True
            self.plan = current_plan(self.model)
            self.ledger.turn(self.plan, self.all_reduced_bytes_per_step)
        return changes

    def gather_states(self) -> None:
        """Collect what differs between the processes, for the next :meth:`take`; call it in all."""
        mine = {"sums": vars(self._sums), "random": random_states()}
        self._states = self.processes.gather("random states", mine)

    def _seed(self, step: int) -> None:
        """From this step on, other random draws than those of the other processes."""
        seed_generators(self.seed, step, self.processes.rank)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(torch.initial_seed())

    def take(self, extra: Mapping[str, Any]) -> Contents:
        """Copy the whole state between two steps, with what else the run needs."""
        self._count_seconds()
        own = {
            "done": self.done,
            "train_seconds": self.train_seconds,
            "new_phase": self._new_phase,
            "sums": vars(self._sums),
            "ledger": self.ledger.state_dict(),
            "processes": self._states,
        }
        with independent():  # the first process alone takes what is alike in all
            return take(**self._parts, extra={**extra, "trainer": own})

    def restore(self, contents: Contents) -> Any:
        """Go on from a copied state; returns the rest of what was copied with it."""
        with independent():  # each by itself, from the same contents
            extra = restore(contents, **self._parts)
        own = extra.pop("trainer")
        self.done, self.train_seconds = own["done"], own["train_seconds"]
        self._new_phase = own["new_phase"]
        states = own["processes"] or [own]
        self.processes_before = len(states)
        self._new_phase |= len(states) != self.processes.size  # it costs other communication
        self._go_on_apart(states)
        self.plan = current_plan(self.model)
        self.ledger.turn(self.plan, self.all_reduced_bytes_per_step)
        self.ledger.load_state_dict(own["ledger"])
        return extra

    def _go_on_apart(self, states: list[Any]) -> None:
        """Take up what differs between the processes; of another number, draw again."""
        rank, size = self.processes.rank, self.processes.size
        sums = [_Sums(**one["sums"]).on(self.machine.device) for one in states]
        if len(states) == size:
            self._sums = sums[rank]
            if size > 1:
                set_random_states(states[rank]["random"])
            return
        self._sums = replace(self._no_sums(), learning_rate=sums[0].learning_rate)
        if rank == 0:
            for one in sums:
                self._sums.add(one.losses, one.scores)
        else:
            self._seed(self.done)

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "ranks": self.ranks}
        return {**parts, "lr_scheduler": self.lr_scheduler}

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss and scores of the test set, by the first process."""
        self.model.eval()
        return self.processes.by_first(
            "the test", lambda: self.task.evaluate(self.model, self.machine.autocast)
        )


def _forms_of(request: Request) -> Plan:
    """The forms in an answer, without its budgets."""
    return {path: one for path, one in request.items() if not isinstance(one, Within)}
