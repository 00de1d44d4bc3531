"""What a process holds and sends, by hand on small models; tests/distributed has it measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank.cost.process_layout import ProcessLayout, local_numel, process_memory, step_traffic


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("shape", [(5,), (8, 3), (1, 4, 2), (7, 0)])
def test_shards_make_up_the_parameter_as_chunks_do(shape: tuple[int, ...], shards: int) -> None:
    found = [local_numel(shape, shard, shards) for shard in range(shards)]
    chunks = [one.numel() for one in torch.empty(shape).chunk(shards)]
    assert sum(found) == math.prod(shape)
    assert found == chunks + [0] * (shards - len(chunks))


def block() -> nn.Sequential:
    """Two units of 8 x 8 and a root of 8 x 5, the last frozen; no biases."""
    with torch.device("meta"):
        own = (
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 5, bias=False),
        )
    own[2].weight.requires_grad_(False)
    return nn.Sequential(*own)


def test_memory_by_hand() -> None:
    plain, ddp = (
        process_memory(block(), ProcessLayout()),
        process_memory(block(), ProcessLayout(1, 4)),
    )
    assert (plain.parameters, plain.gradients, plain.optimizer) == (168 * 4, 512, 1024)
    assert plain.buffers == 0 and ddp.buffers == 512  # the buckets
    sharded = process_memory(block(), ProcessLayout(4, 1, units=("0", "1")))
    # 5 rows over 4 processes: 2 rows each, so that the root is gathered as 8 x 8.
    assert sharded.parameters == (16 + 16 + 16) * 4
    assert (sharded.gradients, sharded.optimizer) == (2 * 16 * 4, 4 * 16 * 4)
    assert sharded.buffers == (64 + 64 + 64) * 4  # root, unit, gradients of the unit
    half = process_memory(block(), ProcessLayout(4, 2, units=("0", "1"), gather_itemsize=2))
    assert half.buffers == sharded.buffers // 2
    assert half.parameters == sharded.parameters
    alone = process_memory(block(), ProcessLayout(4))  # no units: all is gathered with the root
    assert alone.buffers == (3 * 64 + 2 * 64) * 4


def test_traffic_by_hand() -> None:
    ddp = step_traffic(block(), ProcessLayout(1, 4))
    assert (ddp.all_gathered, ddp.reduce_scattered, ddp.all_reduced) == (0, 0, 512)
    assert ddp.sent(ProcessLayout(1, 4)) == (0, 512 * 2 * 3 / 4)
    fsdp = ProcessLayout(4, 1, units=("0", "1"), gather_itemsize=2, micro_batches=3)
    found = step_traffic(block(), fsdp)
    assert found.all_gathered == 3 * (2 * 128 + 64) * 2  # units twice, the frozen root once
    assert found.reduce_scattered == 3 * 128 * 4
    assert found.all_reduced == 0
    hybrid = step_traffic(block(), ProcessLayout(4, 2, units=("0", "1"), micro_batches=3))
    assert hybrid.all_reduced == 128  # a fourth of the gradients, once a step


def test_a_parameter_belongs_to_its_innermost_unit_and_a_tied_one_counts_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    inner[1].weight = inner[0].weight
    model = nn.Sequential(inner, nn.Linear(4, 4, bias=False))
    found = process_memory(model, ProcessLayout(2, 1, units=("0", "0.0")))
    assert found.parameters == 2 * 8 * 4
    assert found.buffers == (16 + 2 * 16) * 4


def test_a_frozen_base_is_gathered_and_neither_reduced_nor_in_the_state() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    full, layout = step_traffic(model, ProcessLayout(8, 1, ("0",))), ProcessLayout(8, 1, ("0",))
    dr.apply_plan(model, {"0": dr.Adapted(8)})
    found, held = step_traffic(model, layout), process_memory(model, layout)
    assert found.all_gathered == full.all_gathered + 2 * 2 * 8 * 64 * 4
    assert found.reduce_scattered == 2 * 8 * 64 * 4 < full.reduce_scattered
    assert held.optimizer == 2 * held.gradients == 2 * 2 * 64 * 4


@pytest.mark.parametrize("name", ["shards", "replicas", "micro_batches"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        ProcessLayout(**{name: 0})


def test_a_unit_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="missing"):
        process_memory(block(), ProcessLayout(2, 1, units=("missing",)))
