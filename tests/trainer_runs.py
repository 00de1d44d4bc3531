"""Runs of transformers' Trainer on tiny models of random weights, and the same in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from host_runs import STEPS, schedule
from pretrained_models import WORDS
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import dynarank as dr
from dynarank.integrations.transformers import DynamicRankCallback

BATCH, LENGTH = 4, 8


def rows(model: nn.Module, count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    """A data set for the model."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, WORDS, (count, LENGTH), generator=g)
    causal = hasattr(model, "lm_head")
    return [{"input_ids": row, "labels": row if causal else int(row[0]) % 4} for row in ids]


def arguments(folder: Path | str, **more: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**usual, **more})


def trainer(
    model: Any,
    folder: Path | str,
    callback: DynamicRankCallback | str = "adapted",
    data: Any = None,
    **more: Any,
) -> tuple[Trainer, DynamicRankCallback]:
    """A Trainer with the callback; arguments of the Trainer itself are given as ``trainer_…``."""
    if isinstance(callback, str):
        callback = DynamicRankCallback(schedule(callback))
    own = {key.removeprefix("trainer_"): more.pop(key) for key in [*more] if "trainer_" in key}
    callbacks = [callback, *own.pop("callbacks", ())]
    if data is None:
        data = rows(own["model_init"]() if model is None else model)
    made = Trainer(model, arguments(folder, **more), train_dataset=data, callbacks=callbacks, **own)
    made.remove_callback(PrinterCallback)
    return made, callback


def losses(made: Trainer) -> list[float]:
    """The loss of each step, those of the run that was resumed first."""
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def fit(model: Any, folder: Path | str, *args: Any, **more: Any) -> list[float]:
    """Train; the loss of each step."""
    resume = more.pop("resume", None)
    made, _ = trainer(model, folder, *args, **more)
    made.train(resume_from_checkpoint=resume)
    return losses(made)


def plain_losses(model: Any, to: str = "adapted", accumulate: int = 1) -> list[float]:
    """What the Trainer does, in a loop: groups by decay, clipping, a linear LR schedule."""
    torch.manual_seed(42)  # TrainingArguments.seed
    optimizer = _adamw(model)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, 1 - step / STEPS))
    ranks = dr.RankScheduler(model, optimizer, schedule(to), STEPS, lr_scheduler=rates, lr_every=1)
    data, found = rows(model, STEPS * BATCH * accumulate), list[float]()
    model.train()
    torch.empty((), dtype=torch.int64).random_()  # as the Trainer's loader draws a seed
    for step in range(STEPS):
        loss = torch.zeros(())
        for i in range(step * accumulate, (step + 1) * accumulate):
            part = _loss(model, data[i * BATCH : (i + 1) * BATCH], accumulate)
            part.backward()
            loss += part.detach()
        found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ranks.step()
    return found


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    spared = {n for n, _ in named if "bias" in n or _is_norm(model, n)}
    groups = [
        {"params": [p for n, p in named if n not in spared], "weight_decay": 0.1},
        {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def _loss(model: Any, batch: list[dict[str, Any]], accumulate: int) -> Tensor:
    """That of a micro-batch: per token of all micro-batches, or of the micro-batches' mean."""
    ids = torch.stack([row["input_ids"] for row in batch])
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in batch])
    if hasattr(model, "lm_head"):
        tokens = {"num_items_in_batch": labels.numel() * accumulate}
        return model(input_ids=ids, labels=labels, **tokens).loss  # type: ignore[no-any-return]
    return model(input_ids=ids, labels=labels).loss / accumulate  # type: ignore[no-any-return]


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
