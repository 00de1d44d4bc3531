"""An operation whose result is remembered returns what it would return if it ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.cost.flops import count_flops, trace
from dynarank.cost.meta_results import RememberedMetaResults

META = torch.device("meta")
Operation = Callable[[Tensor], Any]


def channels_last(x: Tensor) -> Tensor:
    return x.unsqueeze(0).unsqueeze(0).contiguous(memory_format=torch.channels_last)


def normalized(x: Tensor) -> Tensor:
    """Writes to running statistics, which its schema does not say."""
    mean, variance = torch.zeros(6, device=META), torch.ones(6, device=META)
    return F.batch_norm(x, mean, variance, training=True)


NEW: dict[str, Operation] = {
    "elementwise": lambda x: x.sigmoid(),
    "of a transposed tensor": lambda x: x.T.exp(),
    "of a number": lambda x: x * 2,
    "of integers and a number": lambda x: x.long() * 2.5,
    "broadcast": lambda x: x + x[:1],
    "matrix product": lambda x: x.T @ x,
    "of several results": lambda x: x.T.max(dim=0),
    "random": lambda x: F.dropout(x, 0.5),
    "normalization": normalized,
    "convolution": lambda x: F.conv1d(x, torch.empty(3, 4, 3, device=META)),
    "of another dtype": lambda x: x.to(torch.bfloat16),
    "comparison": lambda x: x > 0,
    "nothing in it": lambda x: x[:0].relu(),
    "a batch in channels_last": lambda x: channels_last(x) + 1,
    "a list": lambda x: torch.cat([x, x], dim=1),
    "by a mask": lambda x: torch.where(x > 0, x, 0.0),
}
NOT_NEW: dict[str, Operation] = {
    "itself": lambda x: x.contiguous(),
    "a view": lambda x: x.T,
    "views": lambda x: x.chunk(2),
    "a view that its schema does not tell": lambda x: torch.ops.aten._unsafe_view(x, [24]),
    "views that its schema does not tell": lambda x: torch.ops.aten.unsafe_split(x, 2),
    "detached": lambda x: x.detach(),
    "written in place": lambda x: x.sigmoid_(),
    "written in place twice": lambda x: x.add_(1).mul_(x),
    "turned in place": lambda x: x.t_(),
    "enlarged in place": lambda x: x.resize_(10, 10),
    "given as out": lambda x: torch.add(x, x, out=x),
    "copied over": lambda x: x.copy_(x[:1]),
    "a list written in place": lambda x: torch.ops.aten._foreach_add_([x], 1),
    "given another memory": lambda x: x.set_(torch.empty(4, 6, device=META)),
    "enlarged by broadcasting, as a real tensor is not": lambda x: x[:, :1].pow_(x),
    "conjugated": lambda x: x.to(torch.complex64).conj(),
}


def told(operation: Operation, x: Tensor) -> list[Any]:
    """What can be told of the results, and of the argument after."""
    memory = x.untyped_storage()
    results = [y for y in tree_leaves(operation(x)) if y is not None]
    return [
        (y.shape, y.stride(), y.storage_offset(), y.dtype, y.device, y.untyped_storage().nbytes(),
         y.untyped_storage()._cdata == memory._cdata, y is x)
        for y in (*results, x)
    ]  # fmt: skip


def an_input() -> Tensor:
    return torch.empty(4, 6, device=META)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", [*NEW, *NOT_NEW])
def test_the_same_as_if_it_ran(name: str) -> None:
    operation = {**NEW, **NOT_NEW}[name]
    plain, *again = an_input(), an_input(), an_input(), an_input()
    expected = told(operation, plain)
    with RememberedMetaResults() as remembered:
        for x in again:
            before = len(remembered.results)
            assert told(operation, x) == expected
    assert len(remembered.results) == before, "nothing new the last time"
    assert name in NOT_NEW or remembered.results
    results = [y for y in tree_leaves(operation(an_input()))]
    assert name in NOT_NEW or len({y.untyped_storage()._cdata for y in results}) == len(results)


def test_what_is_made_on_another_device_has_its_values() -> None:
    with RememberedMetaResults():
        made = [(torch.ones(2), torch.arange(3), torch.ones(2, device=META)) for _ in range(2)]
    for ones, numbers, meta in made:
        assert ones.tolist() == [1, 1] and numbers.tolist() == [0, 1, 2] and meta.is_meta


def test_results_do_not_share_memory() -> None:
    with RememberedMetaResults():
        x = an_input()
        found = [x.exp() for _ in range(3)]
    assert len({y.untyped_storage()._cdata for y in found}) == 3


@pytest.mark.parametrize("differs", ["shape", "strides", "dtype", "number", "type of a number"])
def test_other_arguments_other_results(differs: str) -> None:
    x = torch.empty(4, 4, device=META, dtype=torch.int64)
    calls: dict[str, list[Callable[[], Tensor]]] = {
        "shape": [lambda: x.neg(), lambda: x[:2].neg()],
        "strides": [lambda: x.neg(), lambda: x.T.neg()],
        "dtype": [lambda: x.neg(), lambda: x.int().neg()],
        "number": [lambda: x.sum(0), lambda: x[:, :2].sum(1)],
        "type of a number": [lambda: x * 2, lambda: x * 2.0, lambda: x * True],
    }
    expected = [call() for call in calls[differs]]
    with RememberedMetaResults():
        found = [call() for _ in range(2) for call in calls[differs]]
    for y, known in zip(found, 2 * expected, strict=True):
        assert (y.shape, y.stride(), y.dtype) == (known.shape, known.stride(), known.dtype)


def test_gradients_have_the_same_shapes_and_real_tensors_are_computed() -> None:
    torch.manual_seed(0)
    real = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5))
    x = torch.randn(3, 6)
    expected = torch.autograd.grad(real(x).sum(), list(real.parameters()))
    with RememberedMetaResults() as remembered:
        found = torch.autograd.grad(real(x).sum(), list(real.parameters()))
        assert all(map(torch.equal, found, expected)) and not remembered.results
        real.to(META)
        for _ in range(2):
            shapes = torch.autograd.grad(real(x.to(META)).sum(), list(real.parameters()))
            assert [y.shape for y in shapes] == [y.shape for y in expected]


class Reads(nn.Module):
    """An LSTM, then a layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_more_time_steps_ask_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[RememberedMetaResults]()

    def noted() -> RememberedMetaResults:
        seen.append(RememberedMetaResults())
        return seen[-1]

    monkeypatch.setattr("dynarank.cost.counter.RememberedMetaResults", noted)
    model = Reads()
    for steps in (10, 40):
        x = torch.randn(2, steps, 8)
        assert trace(model, x).flops({}) == count_flops(model, x)
    short, _, long, _ = (len(one.results) for one in seen)
    assert short <= long < short + 10
