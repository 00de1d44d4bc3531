"""A trainer wraps the model itself and gives its callbacks the one inside: the wrapper is found."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from process_pool import Pools, spread
from torch import nn

import dynarank as dr

STEPS, INFLATE, DEFLATE = 9, 3, 6


def schedule(to: str) -> Any:
    how: Any = {"rank": 4, "inflate": INFLATE, "deflate": DEFLATE, "to": to}
    return dr.schedules.dynamic_rank(**how)


@contextmanager
def launched() -> Generator[None]:
    """The environment that torchrun gives."""
    from accelerate.state import AcceleratorState

    own = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    own |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({key: str(value) for key, value in own.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore
        for key in own:
            del os.environ[key]


def tokens() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 64, (STEPS * 8, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def with_a_trainer(folder: str, to: str) -> tuple[list[float], list[str], str]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    spreads, forms = [], list[str]()

    class Ranks(TrainerCallback):
        ranks: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model, optimizer = given["model"], given["optimizer"]
            torch.manual_seed(100 + dist.get_rank())  # other adapters, if each made its own
            self.ranks = dr.RankScheduler(model, optimizer, schedule(to), state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.ranks.step()
            spreads.append(spread(given["model"]))
            forms.append(type(dr.current_plan(given["model"])["transformer.h.0.mlp.c_fc"]).__name__)

    with launched():
        config: Any = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 1}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**config, n_head=2, bos_token_id=0, eos_token_id=1))
        arguments = Arguments(
            folder, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=3e-3,
            report_to=[], use_cpu=True, save_strategy="no", seed=0, disable_tqdm=True,
            ddp_backend="gloo", dataloader_pin_memory=False,
        )  # fmt: skip
        data = cast(Any, tokens())
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Ranks()])
        trainer.train()
        return spreads, forms, type(trainer.model_wrapped).__name__


@pytest.mark.parametrize("to", ["adapted", "low-rank"])
def test_a_callback_of_the_trainer_changes_all_processes_alike(
    processes: Pools, tmp_path: Any, to: str
) -> None:
    pytest.importorskip("transformers")
    for spreads, forms, wrapper in processes(2)(with_a_trainer, str(tmp_path), to):
        assert wrapper == "DistributedDataParallel"
        assert len(spreads) == STEPS and max(spreads) == 0.0
        last = "Adapted" if to == "adapted" else "LowRank"
        assert forms == ["LowRank"] * 2 + ["FullRank"] * 3 + [last] * 4


def with_accelerate(unused: bool) -> list[float]:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    with launched():
        options = DistributedDataParallelKwargs(find_unused_parameters=unused)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(inner, optimizer)
        torch.manual_seed(100 + dist.get_rank())
        how = schedule("adapted")
        ranks = dr.RankScheduler(inner, optimizer, how, STEPS, layers="0")  # not the wrapper
        spreads = []
        for _ in range(STEPS):
            loss = model(torch.randn(8, 16)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
            spreads.append(spread(inner))
        return spreads


@pytest.mark.parametrize("unused", [False, True])
def test_a_prepared_model_is_changed_in_all_processes_alike(processes: Pools, unused: bool) -> None:
    pytest.importorskip("accelerate")
    for spreads in processes(2)(with_accelerate, unused):
        assert max(spreads) == 0.0
