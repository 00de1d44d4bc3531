"""What the cost model says of several processes is what they hold and communicate, to the byte."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from process_pool import Pools
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.process_layout import (
    ProcessLayout,
    StepTraffic,
    local_numel,
    process_memory,
    step_traffic,
)
from dynarank.forms import Form

FORMS = {"full-rank": FullRank(), "low-rank": LowRank(3), "adapted": Adapted(3)}
UNITS = ("blocks.0", "blocks.1")


class Net(nn.Module):
    """Two blocks and a root of its own; no side is a multiple of the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, side), nn.ReLU(), nn.Linear(side, 13)) for side in (9, 22)
        )
        self.head = nn.Linear(13, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(form: Form) -> Net:
    model = Net()
    dr.apply_plan(model, {f"blocks.{i}.{j}": form for i in (0, 1) for j in (0, 2)})
    return model


def reduced_by_ddp(name: str) -> tuple[int, int]:
    """The bytes of the buckets in a step, and how many trainable entries there are."""
    sizes: list[int] = []

    def count(group, bucket):  # DDP checks annotations, which are strings here
        sizes.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    model = net(FORMS[name])
    ddp = DDP(model)
    ddp.register_comm_hook(dist.group.WORLD, count)
    ddp(torch.ones(2, 7)).sum().backward()
    return sum(sizes), sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FORMS)
def test_ddp_reduces_what_is_predicted(processes: Pools, name: str) -> None:
    model, layout = net(FORMS[name]), ProcessLayout(replicas=2)
    predicted, held = step_traffic(model, layout), process_memory(model, layout)
    assert predicted == StepTraffic(0, 0, predicted.all_reduced)
    for buckets, gradients in processes(2)(reduced_by_ddp, name):
        assert buckets == predicted.all_reduced == held.buffers
        assert gradients == held.gradients


class Counted:
    """A collective of FSDP2 that notes the bytes of its whole tensor."""

    def __init__(self, whole: str, collective: str) -> None:
        self.whole, self.run, self.bytes = whole, getattr(dist, collective), 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
        **more: Any,
    ) -> Any:
        self.bytes += (output_tensor if self.whole == "output" else input_tensor).nbytes
        return self.run(output_tensor, input_tensor, group=group, async_op=async_op, **more)


def sharded(name: str, replicas: int, mixed: bool, passes: int) -> dict[str, Any]:
    """What a process of FSDP2 or HSDP holds and communicates in a step."""
    model, size = net(FORMS[name]), dist.get_world_size()
    shape, names = (size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, size // replicas), ("replicate", "shard")
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, **({"mp_policy": policy} if policy else {}))
    gather = Counted("output", "all_gather_into_tensor")
    scatter = Counted("input", "reduce_scatter_tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters())
    reduced = 0

    def all_reduce(tensor: Tensor, *args: Any, **named: Any) -> Any:
        nonlocal reduced
        reduced += tensor.nbytes
        return plain(tensor, *args, **named)

    plain = dist.all_reduce
    with patch.object(dist, "all_reduce", all_reduce):
        for i in range(passes):
            model.set_requires_all_reduce(i == passes - 1)
            model(torch.ones(2, 7)).sum().backward()
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    states = [v.to_local() for s in optimizer.state.values() for v in s.values() if v.ndim > 0]
    return {
        "traffic": (gather.bytes, scatter.bytes, reduced),
        "local": {n: p.to_local().numel() for n, p in model.named_parameters()},
        "parameters": sum(p.to_local().nbytes for p in model.parameters()),
        "gradients": sum(one.nbytes for one in gradients),
        "optimizer": sum(one.nbytes for one in states),
    }


@pytest.mark.parametrize(
    ("name", "size", "replicas", "mixed", "passes"),
    [
        ("full-rank", 2, 1, False, 1),
        ("low-rank", 2, 1, True, 1),
        ("adapted", 2, 1, True, 2),
        ("adapted", 4, 1, False, 1),
        ("low-rank", 4, 2, True, 2),
        ("adapted", 4, 2, False, 1),
    ],
)
def test_fsdp2_holds_and_moves_what_is_predicted(
    processes: Pools, name: str, size: int, replicas: int, mixed: bool, passes: int
) -> None:
    shards, items = size // replicas, {"gather_itemsize": 2, "reduce_itemsize": 4} if mixed else {}
    layout = ProcessLayout(shards, replicas, UNITS, **items, micro_batches=passes)
    model = net(FORMS[name])
    traffic, held = step_traffic(model, layout), process_memory(model, layout)
    for rank, found in enumerate(processes(size)(sharded, name, replicas, mixed, passes)):
        expected = (traffic.all_gathered, traffic.reduce_scattered, traffic.all_reduced)
        assert found["traffic"] == expected
        for path, parameter in model.named_parameters():
            own = local_numel(parameter.shape, rank % shards, shards)
            assert found["local"][path] == own, path
        for part in ("parameters", "gradients", "optimizer"):
            assert found[part] <= getattr(held, part)
            assert rank % shards or found[part] == getattr(held, part)  # the first holds most
