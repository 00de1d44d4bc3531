"""Processes that train together agree, or all of them are told what differs or has failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pool import Pools
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.distributed.processes import (
    DisagreementError,
    PeerError,
    Processes,
    independent,
    processes_of,
)


def said(call: Any) -> str:
    """The type and text of what a call raises."""
    try:
        return repr(call())
    except (DisagreementError, PeerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def differing_plans() -> str:
    plan = {"0": "low-rank 4", "2": "low-rank 4" if dist.get_rank() == 0 else "full-rank"}
    return said(lambda: processes_of(nn.Linear(2, 2)).agree("the plan of step 8", plan))


def test_a_difference_is_named_in_all_processes(processes: Pools) -> None:
    for text in processes(2)(differing_plans):
        assert "differ in the plan of step 8['2']: 'low-rank 4' in process 0" in text
        assert "'full-rank' in process 1" in text


def other_business() -> str:
    together = processes_of(nn.Linear(2, 2))
    what = "the change of step 8" if dist.get_rank() == 0 else "the save of step 8"
    return said(lambda: together.gather(what, 1))


def test_processes_about_different_things_are_told(processes: Pools) -> None:
    for text in processes(2)(other_business):
        assert "'the change of step 8' in process 0, 'the save of step 8' in process 1" in text


def fails_in_one() -> str:
    def work() -> int:
        if dist.get_rank() == 1:
            raise ValueError("no room")
        return 7

    return said(lambda: processes_of(nn.Linear(2, 2)).attempt("saving", work))


def test_a_failure_in_one_process_is_raised_in_all(processes: Pools) -> None:
    first, second = processes(2)(fails_in_one)
    assert first == "PeerError: saving failed in process 1: ValueError: no room"
    assert second == "ValueError: no room"


def sent() -> list[Any]:
    rank, found = dist.get_rank(), []
    together = processes_of(nn.Linear(2, 2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        tensors = [torch.full((2, 3, 4, 5), rank + 1, dtype=dtype), torch.tensor(rank, dtype=dtype)]
        tensors += [torch.full((3, 2), rank, dtype=dtype).T, torch.empty(0, dtype=dtype)]
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        together.send(tensors, owner=1)
        found += [t.unique().tolist() for t in tensors]
    return found


def test_tensors_of_any_dtype_and_layout_are_sent(processes: Pools) -> None:
    for found in processes(2)(sent):
        assert found == [[2], [1], [1], []] * 5


def members() -> list[int]:
    pair = dist.new_group([0, 1])
    other = dist.new_group([2, 3])
    group = pair if dist.get_rank() < 2 else other
    model = nn.Linear(2, 2)
    wrapper = DistributedDataParallel(model, process_group=group)
    hidden = processes_of(model, training=False)
    with independent():
        alone = processes_of(model)
    plain = processes_of(nn.Linear(2, 2))
    copy = processes_of(nn.Linear(2, 2), training=False)
    del wrapper
    return [hidden.size, sum(hidden.gather("rank", dist.get_rank())), alone.size, plain.size,
            copy.size]  # fmt: skip


def test_those_of_the_wrapper_train_together(processes: Pools) -> None:
    found = processes(4)(members)
    assert found == [[2, 1, 1, 4, 1]] * 2 + [[2, 5, 1, 4, 1]] * 2


def test_one_process_agrees_with_itself() -> None:
    alone = Processes()
    assert alone.gather("x", 3) == [3] and alone.from_first("x", 4) == 4
    with pytest.raises(ValueError, match="no"):
        alone.attempt("x", lambda: int("no"))
