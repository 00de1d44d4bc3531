"""Dynamic rank under transformers' Trainer, by a callback; ``save_pretrained`` of ranked models.

A checkpoint of the Trainer is resumed in whatever form its layers have. The model follows loads, so
it has the saved forms before the Trainer makes an optimizer of its parameters. The rank scheduler's
state lies in ``optimizer.pt``, beside the states that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn

try:
    from transformers.trainer import Trainer
    from transformers.trainer_callback import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"dynarank.integrations.transformers needs transformers and accelerate ({error}): "
        "pip install 'dynarank[hf]'"
    ) from error

from dynarank.distributed.wrappers import live
from dynarank.form_data import form_to_data
from dynarank.integrations.optimizer_entry import OptimizerEntry, load_by_name, write_with
from dynarank.integrations.pretrained import save_forms_with_models
from dynarank.integrations.trainer_checks import check_movable_states, check_trainer
from dynarank.layers.form_entry import KEY, to_tensor
from dynarank.scheduler.budgets import Batches
from dynarank.scheduler.callbacks import CallbackLike
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.schedules.base import Schedule, as_schedule
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.optimizer_state import Moments
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import survey

__all__ = ["DynamicRankCallback"]

save_forms_with_models()


class DynamicRankCallback(TrainerCallback):
    """Changes the ranks of a model while transformers' Trainer trains it.

    Give it to ``Trainer(..., callbacks=[DynamicRankCallback(schedule)])``. Each call of ``train()``
    makes a :class:`dynarank.RankScheduler` of the prepared model, optimizer and LR scheduler, over
    ``max_steps`` steps; one that resumes from a checkpoint goes on as if it had not been
    interrupted.

    Args:
        schedule: as of :class:`dynarank.RankScheduler`, like all others.
        layers: the scheduled layers, by their paths in the model.
        moments: how the optimizer's moments are converted.
        batches: a function that returns a few training batches.
        callbacks: called around each change; those of dynarank, not of transformers.

    Raises:
        ValueError: the Trainer shards the model (FSDP, DeepSpeed), or it is a PEFT model; as the
            RankScheduler when training begins, also for an optimizer whose state cannot be moved;
            a checkpoint to resume from has no state of such a run, or that of another.

    Example:
        >>> schedule = dr.schedules.dynamic_rank(rank=0.25)
        >>> callback = DynamicRankCallback(schedule, layers=["bert.encoder.*"])
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        layers: LayerFilter = None,
        moments: Moments = "project",
        batches: Batches | None = None,
        callbacks: Sequence[CallbackLike] = (),
    ) -> None:
        self.schedule = as_schedule(schedule)
        self._ranks: RankScheduler | None = None
        self._options: dict[str, Any] = {
            "layers": layers,
            "moments": moments,
            "batches": batches,
            "callbacks": callbacks,
        }
        self._hooks: list[Any] = []

    @property
    def ranks(self) -> RankScheduler:
        """The rank scheduler of the last ``train()``.

        Raises:
            RuntimeError: ``train``, which makes it, has not been called yet.
        """
        if self._ranks is None:
            raise RuntimeError("there is no rank scheduler yet: trainer.train makes it")
        return self._ranks

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model take checkpoints of other forms: they are loaded before training begins."""
        check_trainer(args, given["model"])
        follow_loads(given["model"])
        for trainer in _trainers_of(self):
            _follow_made_models(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin a run, or go on with the one of the checkpoint."""
        self._close()
        model, optimizer = given["model"], given["optimizer"]
        check_trainer(args, model)
        _check_alone(self)
        check_movable_states(optimizer, self._options["moments"])
        entry = OptimizerEntry.taken_from(optimizer)
        resumed = _resumed(entry, model, state.global_step) if state.global_step else None
        self._ranks = ranks = RankScheduler(
            model,
            optimizer,
            self.schedule,
            state.max_steps,
            **_learning_rates(given["lr_scheduler"]),
            **self._options,
            state=None if resumed is None else resumed.ranks,
        )
        if resumed is not None:
            load_by_name(optimizer, resumed.names)
            if resumed.ranks["uncounted"]:  # saved by a callback that is called before this one
                ranks.step()
        self._hooks = [
            write_with(optimizer, ranks, lambda: state.global_step),
            ranks.model.register_state_dict_post_hook(_sign),
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Bring the model to the plan of the next step."""
        self.ranks.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take every hook off; the best model, if the Trainer loads it, is loaded by now."""
        self._close()

    def _close(self) -> None:
        """End the run, also one that an exception has ended."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._ranks is not None:
            self._ranks.close()


def _sign(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Say that a model of ours wrote the state, so that what is full-rank in it is so there."""
    state.setdefault(prefix + KEY, to_tensor({}))


def _trainers_of(callback: DynamicRankCallback) -> list[Any]:
    handlers = [(one, getattr(one, "callback_handler", None)) for one in live(Trainer)]
    return [one for one, handler in handlers if callback in getattr(handler, "callbacks", ())]


def _check_alone(callback: DynamicRankCallback) -> None:
    """Raise ValueError if a Trainer has two of these callbacks: each would undo the other's."""
    for trainer in _trainers_of(callback):
        of_ours = [
            isinstance(one, DynamicRankCallback) for one in trainer.callback_handler.callbacks
        ]
        if sum(of_ours) > 1:
            raise ValueError(
                f"the Trainer has {sum(of_ours)} DynamicRankCallbacks, and a model follows one "
                "schedule: leave one of them, with a function (clock, readings) -> plan that asks "
                "both schedules, or trainer.remove_callback the one of an earlier run"
            )


def _follow_made_models(trainer: Any) -> None:
    """Let the models that the Trainer makes by ``model_init`` take checkpoints of other forms."""
    if trainer.model_init is None:
        return
    make = trainer.call_model_init

    def call_model_init(trial: Any = None) -> Any:
        follow_loads(model := make(trial))
        return model

    trainer.call_model_init = call_model_init


def _learning_rates(lr_scheduler: Any) -> dict[str, Any]:
    """What the rank scheduler is told of the LR scheduler: stepped once a step, or by a metric."""
    by_metric = "metrics" in signature(lr_scheduler.step).parameters
    return {} if by_metric else {"lr_scheduler": lr_scheduler, "lr_every": 1}


def _resumed(entry: OptimizerEntry | None, model: nn.Module, step: int) -> OptimizerEntry:
    """The saved run to go on with.

    Raises:
        ValueError: there is none, or its files are of different steps.
    """
    if entry is None:
        raise ValueError(
            f"the checkpoint of step {step} has no state of a rank schedule in its optimizer.pt: "
            "it was saved without DynamicRankCallback or with save_only_model=True, or optimizer.pt"
            " or scheduler.pt is missing; use another checkpoint, or begin a new run with its "
            "weights, Trainer(model=...from_pretrained(folder)), without resume_from_checkpoint"
        )
    if entry.step != step:
        raise ValueError(
            f"optimizer.pt is of step {entry.step}, trainer_state.json of step {step}: the "
            "checkpoint's files are of different steps; use another checkpoint"
        )
    saved: dict[str, Any] = entry.ranks["forms"]
    own = {site.path: form_to_data(site.form) for site in survey(model) if site.form is not None}
    if other := [path for path, form in saved.items() if own.get(path) != form]:
        raise ValueError(
            f"layer {other[0]!r} ({len(other)} in all) was saved as {saved[other[0]]} and is "
            f"{own.get(other[0])} after the weights were loaded: they are not those of step "
            f"{step}, or the model did not follow the load; use another checkpoint, and give the "
            "callback to Trainer(..., callbacks=[...]), not to add_callback"
        )
    return entry
