"""Lightning: ``Trainer(callbacks=[DynamicRankCallback(schedule)])`` is all that a run needs.

Importing this module also lets every ``LightningModule`` take checkpoints of other forms, in
``load_from_checkpoint`` and without a trainer too.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynarank.form_data import form_from_data
from dynarank.layers import RankedLayer
from dynarank.layers.form_entry import KEY
from dynarank.scheduler.budgets import Batches
from dynarank.scheduler.callbacks import CallbackLike
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.schedules.base import Schedule
from dynarank.sinks.extras import import_extra
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.optimizer_state import Moments
from dynarank.surgery.own_references import wrapped
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.verbs import apply_plan

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["DynamicRankCallback"]

_PACKAGES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
_BAD_VERSIONS = ("2.6.2", "2.6.3")
# Strategies that flatten parameters into buffers of their own, which no new parameter can enter.
_REFUSED = {
    "FSDPStrategy": "ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or 'ddp'",
    "DeepSpeedStrategy": "'ddp', or ModelParallelStrategy with fully_shard (FSDP2)",
}


def _host() -> Any:
    """Lightning, by the name that the program has imported, or else that is installed.

    Raises:
        ImportError: it is not installed, or a version that is excluded.
    """
    versions = {module: _version(package) for module, package in _PACKAGES.items()}
    installed = [module for module, version in versions.items() if version is not None]
    used = [module for module in installed if module in sys.modules]
    module = next(iter(used or installed), "lightning.pytorch")
    if versions[module] in _BAD_VERSIONS:
        raise ImportError(
            f"{_PACKAGES[module]} {versions[module]} is installed, and dynarank does not run with "
            f"{' and '.join(_BAD_VERSIONS)}: install another version, such as 2.6.6"
        )
    return import_extra(module, "lightning", "DynamicRankCallback")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if not TYPE_CHECKING:
    _lightning = _host()
    Callback, LightningModule = _lightning.Callback, _lightning.LightningModule
    GradientAccumulationScheduler = _lightning.callbacks.GradientAccumulationScheduler


class DynamicRankCallback(Callback):
    """Drives a rank scheduler in a Lightning trainer; each optimizer step counts once.

    The rank scheduler is made when ``fit`` starts, of the module as the trainer runs it, its
    optimizers and the LR scheduler of the first of these. Checkpoints of the trainer hold its
    state: ``fit(ckpt_path=...)`` goes on bit by bit, from any form. In manual optimization, all
    optimizers that step in one batch count as one step.

    Args:
        schedule: as of :class:`dynarank.RankScheduler`, like all others.
        total_steps: how many steps the run has. None: by the trainer's ``max_steps``,
            ``max_epochs``, accumulation and number of batches.
        layers: the scheduled layers, by their paths in the LightningModule.
        lr_scheduler: the learning rates of the run, evenly spaced; None: a copy of the LR scheduler
            from ``configure_optimizers`` is run ahead.
        lr_every: how many optimizer steps pass from one step of the LR scheduler to the next; None:
            by its ``interval`` and ``frequency``.
        moments: how the optimizer's moments are converted.
        batches: a function that returns a few training batches.
        callbacks: called around each change; those of dynarank, not of Lightning.

    Raises:
        ValueError: when ``fit`` starts, before any step: the strategy keeps parameters in flat
            buffers; the length of the run is unknown; the checkpoint or the trainer is of a run
            without this callback; whatever a rank scheduler refuses.

    Example:
        >>> import lightning as L
        >>> schedule = dr.schedules.dynamic_rank(rank=0.25)
        >>> callback = DynamicRankCallback(schedule, layers=["net.*"])
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        total_steps: int | None = None,
        layers: LayerFilter = None,
        lr_scheduler: Sequence[float] | None = None,
        lr_every: int | None = None,
        moments: Moments = "project",
        batches: Batches | None = None,
        callbacks: Sequence[CallbackLike] = (),
    ) -> None:
        self._schedule, self._total_steps = schedule, total_steps
        self._options: dict[str, Any] = {
            "layers": layers,
            "moments": moments,
            "batches": batches,
            "callbacks": callbacks,
        }
        rates = {"lr_scheduler": lr_scheduler, "lr_every": lr_every}
        self._rates = {name: value for name, value in rates.items() if value is not None}
        self._ranks: RankScheduler | None = None
        self._state: Mapping[str, Any] | None = None  # of a checkpoint that is being restored
        self._max_epochs: int | None = None
        self._uncounted = False
        self._steps_before = 0  # of the trainer, before this batch
        self._by_max_steps = False

    @property
    def ranks(self) -> RankScheduler:
        """The rank scheduler of the last ``fit``.

        Raises:
            RuntimeError: ``fit``, which makes it, has not started yet.
        """
        if self._ranks is None:
            raise RuntimeError("there is no rank scheduler yet: trainer.fit makes it")
        return self._ranks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module take checkpoints of other forms."""
        if stage == "fit":
            _check_strategy(trainer)
        self._state, self._max_epochs = None, trainer.max_epochs
        for one in (pl_module, *_averages(trainer)):
            follow_loads(one)
        if trainer.strategy.restore_checkpoint_after_setup:
            self._bring_before_loads(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its own way to load back."""
        vars(trainer.strategy).pop("load_checkpoint", None)

    def _bring_before_loads(self, trainer: Trainer) -> None:
        """Let a strategy that loads into shards do so after the forms have been brought."""
        strategy: Any = trainer.strategy
        vars(strategy).pop("load_checkpoint", None)
        plain = strategy.load_checkpoint

        def load_checkpoint(checkpoint_path: Any, *args: Any, **more: Any) -> dict[str, Any]:
            place = Path(strategy.broadcast(checkpoint_path))
            own, safe = place.is_file(), more.get("weights_only")
            saved = torch.load(place if own else place / "meta.pt", mmap=own, weights_only=safe)
            state = saved.get("callbacks", {}).get(self.state_key, {}).get("ranks")
            if state is not None:
                self._bring(trainer, state)
            return plain(checkpoint_path, *args, **more)

        strategy.load_checkpoint = load_checkpoint

    def _bring(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self.ranks.load_state_dict(state)
            self._uncounted = state["uncounted"] > 0
            # As Lightning's own tuners do: data are set up again, with the states of the loaders.
            trainer.fit_loop._combined_loader = None  # pyright: ignore[reportPrivateUsage]
        else:
            forms = {path: form_from_data(data) for path, data in state["forms"].items()}
            apply_plan(trainer.lightning_module, forms)

    def state_dict(self) -> dict[str, Any]:
        """The rank scheduler's state; None before it is made, as when a tuner saves."""
        return {"ranks": None if self._ranks is None else self._ranks.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint for the rank scheduler, which is made later."""
        self._state = state_dict["ranks"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on in the middle of a run that had no rank scheduler."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise _no_position(checkpoint["global_step"], "the checkpoint has no state of it")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the rank scheduler, which applies the first plan or goes on from a checkpoint."""
        state, before = self._state, self._ranks
        if again := state is None and trainer.global_step > 0:  # fit is called again
            if before is None or before.model is not pl_module:
                raise _no_position(trainer.global_step, "they were made without it")
            state = before.state_dict()
        if state is None:
            trainer.fit_loop.setup_data()  # tells how many batches there are
            total = self._total_steps or _length(trainer, self._max_epochs)
        else:  # the data are set up later, such that loaders take their states first
            total = self._total_steps or state["total_steps"]
        if before is not None:
            before.close()
        rates = {} if "lr_scheduler" in self._rates else _rates(trainer)
        options: dict[str, Any] = {**self._options, **rates, **self._rates, "state": state}
        model = trainer.strategy.model or pl_module
        self._ranks = RankScheduler(model, trainer.optimizers, self._schedule, total, **options)
        if before is not None and again:  # a checkpoint of another form may have been tested since
            last = before._forms_loaded  # pyright: ignore[reportPrivateUsage]
            self._ranks._forms_loaded = last  # pyright: ignore[reportPrivateUsage]
        for one in _averages(trainer):
            self._ranks.follow(one)
        self._uncounted = state is not None and state["uncounted"] > 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the length of a run that goes on; count what its checkpoint left uncounted."""
        self._steps_before = trainer.global_step
        if self._total_steps is None:
            self._by_max_steps = _by_max_steps(trainer) <= _by_epochs(trainer, self._max_epochs)
            total, saved = _length(trainer, self._max_epochs), self.ranks.total_steps
            if total != saved:
                raise ValueError(
                    f"the run that goes on has {saved} steps, this trainer's has {total}: give the "
                    "Trainer the same max_steps, max_epochs, batches and accumulation, or keep the "
                    f"schedule as it was by DynamicRankCallback(..., total_steps={saved})"
                )
        if self._uncounted:  # the checkpoint was saved before this callback had seen its last step
            self._step(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the optimizer step, if there was one, and bring the model to the next plan."""
        made, self._steps_before = trainer.global_step - self._steps_before, trainer.global_step
        if not pl_module.automatic_optimization and self._total_steps is None:
            self._check_pace(trainer, made)
        if self._max_epochs in (None, -1) or trainer.current_epoch < self._max_epochs:
            # In the epoch that StochasticWeightAveraging adds nothing is trained.
            self._step(trainer, pl_module)

    def _step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ranks.step():
            _name_groups(trainer, pl_module)

    def _check_pace(self, trainer: Trainer, made: int) -> None:
        """Raise ValueError if manual optimization takes other steps than the length tells."""
        count = len(trainer.optimizers)
        if made not in (0, count) if self._by_max_steps else made == 0:
            rule = (
                f"Trainer(max_steps={trainer.max_steps}) counts those of all {count} optimizers, "
                "and is right only if all of them step in the same batches"
                if self._by_max_steps
                else "the length of the run follows from its epochs only if each batch has a step"
            )
            raise ValueError(
                f"manual optimization took {made} optimizer steps in a batch: {rule}; give "
                "DynamicRankCallback(..., total_steps=), the number of batches in which an "
                "optimizer steps"
            )


def _check_strategy(trainer: Trainer) -> None:
    for name in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        if name in _REFUSED:
            raise ValueError(
                f"the trainer's strategy is {name}, which keeps parameters in flat buffers that "
                f"cannot follow a change of form: use {_REFUSED[name]}"
            )


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averaged copies of Lightning's callbacks: WeightAveraging, StochasticWeightAveraging."""
    callbacks: Sequence[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = [getattr(one, "_average_model", None) for one in callbacks]
    return [one for one in found if isinstance(one, nn.Module)]


def _name_groups(trainer: Trainer, pl_module: LightningModule) -> None:
    """Tell BaseFinetuning, which saves the names of each group's parameters, the new ones."""
    names = {one: name for name, one in pl_module.named_parameters()}
    for one in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        for number, groups in getattr(one, "_internal_optimizer_metadata", {}).items():
            now = trainer.optimizers[number].param_groups
            for group, own in zip(groups, now, strict=False):
                group["params"] = [names[p] for p in own["params"]]


def _no_position(steps: int, why: str) -> ValueError:
    return ValueError(
        f"the trainer is to go on after {steps} steps, and DynamicRankCallback does not know its "
        f"position: {why}. To begin a schedule with trained weights, load only these "
        "(LightningModule.load_from_checkpoint) and fit with a new Trainer, without ckpt_path"
    )


def _length(trainer: Trainer, max_epochs: int | None) -> int:
    """How many steps the run has.

    Raises:
        ValueError: it has no end, or its number of batches is unknown.
    """
    total = min(_by_max_steps(trainer), _by_epochs(trainer, max_epochs))
    if total == math.inf:
        raise ValueError(
            f"the length of the run is unknown (max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, {trainer.num_training_batches} batches an epoch), and "
            "the schedule needs it: give Trainer(max_steps=) or "
            "DynamicRankCallback(..., total_steps=)"
        )
    return max(1, int(total))


def _by_max_steps(trainer: Trainer) -> float:
    """In manual optimization the trainer counts the steps of each optimizer."""
    if trainer.max_steps == -1:
        return math.inf
    manual = not trainer.lightning_module.automatic_optimization
    return trainer.max_steps // (len(trainer.optimizers) if manual else 1)


def _by_epochs(trainer: Trainer, max_epochs: int | None) -> float:
    if max_epochs in (None, -1):
        return math.inf
    return sum(_steps_per_epoch(trainer, epoch) for epoch in range(max_epochs))


def _steps_per_epoch(trainer: Trainer, epoch: int = 0) -> float:
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    for one in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(one, GradientAccumulationScheduler):
            accumulate = one.get_accumulate_grad_batches(epoch)
    return batches if batches == math.inf else math.ceil(batches / accumulate)


def _rates(trainer: Trainer) -> dict[str, Any]:
    """The LR scheduler of the first optimizer, and how often it is stepped if Lightning does."""
    first = wrapped(trainer.optimizers[0])
    for config in trainer.lr_scheduler_configs:
        if any(config.scheduler.optimizer is one for one in first):
            every: float = config.frequency
            if not trainer.lightning_module.automatic_optimization:
                every = math.inf
            elif config.interval == "epoch":
                every *= _steps_per_epoch(trainer)
            else:  # asked at the batches in which the optimizer steps
                every = math.lcm(config.frequency, n := trainer.accumulate_grad_batches) // n
            return {
                "lr_scheduler": config.scheduler,
                "lr_every": None if every == math.inf else int(every),
            }
    return {}


def _follow_all_loads(module: Any) -> None:
    """Let every LightningModule take states of other forms, whoever loads them."""
    plain = module.load_state_dict

    @wraps(plain)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **more: Any) -> Any:
        ranked = any(key.rpartition(".")[2] == KEY for key in state_dict)
        if ranked or any(isinstance(one, RankedLayer) for one in self.modules()):
            follow_loads(self)
        return plain(self, state_dict, *args, **more)

    module.load_state_dict = load_state_dict


_follow_all_loads(LightningModule)
