"""Under ``torch.compile``: no graph break, eager's values and gradients, one compilation a change.

Graphs run by the ``"eager"`` backend, which needs no C++ compiler: what is tested is what dynamo
makes of the code. One test runs them by ``"inductor"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import ALL_FORMS, LAYERS, LayerCase, assert_close, fitting, randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form

# A covering set: the layer, and whether under autocast to bf16.
CASES = [
    (next(case for case in LAYERS if case.name == name), autocast)
    for name, autocast in [
        ("linear", False), ("linear", True), ("conv-circular", False), ("transposed-2d", True),
    ]
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"  # dynamo's own, of autograd functions
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Compiled:
    """A model compiled whole, and how often it was."""

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.call: Callable[[Any], Any] = torch.compile(
            model, backend=self.counter, fullgraph=True, dynamic=False
        )

    @property
    def count(self) -> int:
        return self.counter.frame_count


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and every parameter that trains."""
    x = x.clone().requires_grad_()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = call(x)
    generator = torch.Generator().manual_seed(3)
    seed = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, seed)]


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize(("case", "autocast"), CASES, ids=str)
def test_every_form_compiles_whole(case: LayerCase, form: Form, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(case.make()), torch.randn(case.shape)
    dr.apply_plan(model, {"0": fitting(model, LowRank(2))})  # full-rank in the ranked class too
    dr.apply_plan(model, {"0": fitting(model, form)})
    randomize(model)
    compiled = Compiled(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(model, model, x)
        found = gradients(model, compiled.call, x)
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two)
    assert compiled.count == 1


def test_an_embedding_compiles_in_every_form() -> None:
    words = torch.randint(0, 20, (3, 5))
    for form in ALL_FORMS:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Embedding(20, 8))
        dr.apply_plan(model, {"0": form})
        compiled = Compiled(model)
        assert_close(compiled.call(words), model(words))
        assert compiled.count == 1


def train(model: nn.Module, call: Callable[[Any], Any], x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        model.zero_grad()
        y = call(x)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()


PLANS: list[Form] = [
    LowRank(4), FullRank(), Adapted(4, execution="merged"), Adapted(4, execution="two-branch"),
    LowRank(4, execution="joined"), LowRank(2, execution="joined"),
]  # fmt: skip


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def test_one_compilation_for_each_change_and_none_else() -> None:
    model, x = mlp(), torch.randn(8, 16)
    compiled = Compiled(model)
    train(model, compiled.call, x)
    for i, form in enumerate(PLANS):
        assert compiled.count == i + 1
        dr.apply_plan(model, {"0": form, "2": form})
        train(model, compiled.call, x)
        assert compiled.count == i + 2
        dr.apply_plan(model, {"0": form, "2": form})  # changes nothing
        train(model, compiled.call, torch.randn(8, 16))  # another batch of the shape
        assert compiled.count == i + 2
        assert_close(compiled.call(x), model(x))


@torch._dynamo.config.patch(recompile_limit=3)
def test_beyond_the_limit_an_error_or_eager() -> None:
    """Torch compiles a frame ``recompile_limit`` times; afterwards it runs eagerly, or raises if it
    was asked for whole graphs. ``torch.compiler.reset()`` starts again."""
    model, x = mlp(), torch.randn(8, 16)
    whole, loose = Compiled(model), CompileCounterWithBackend("eager")
    for form in (FullRank(), LowRank(4), Adapted(4)):
        dr.apply_plan(model, {"0": form})
        whole.call(x)
    dr.apply_plan(model, {"0": LowRank(2)})
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        whole.call(x)
    torch.compiler.reset()
    whole.call(x)
    assert whole.count == 4
    torch.compiler.reset()
    call = torch.compile(model, backend=loose)
    for rank in (1, 2, 3, 4, 5):
        dr.apply_plan(model, {"0": LowRank(rank)})
        assert_close(call(x), model(x))


def test_a_training_run_of_rotating_plans_stays_within_bounds() -> None:
    """Forms that come back are found in the cache: nothing is compiled a second time."""
    model, x = mlp(), torch.randn(8, 16)
    compiled = Compiled(model)
    for _ in range(3):
        for form in (LowRank(4), FullRank(), Adapted(4)):
            dr.apply_plan(model, {"0": form, "2": form})
            train(model, compiled.call, x)
    assert compiled.count == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # its own, at import
def test_inductor_through_the_phases() -> None:
    model, x = mlp(), torch.randn(8, 16)
    try:
        torch.compile(nn.Linear(4, 4), backend="inductor")(torch.randn(2, 4))
    except Exception as error:
        pytest.skip(f"inductor does not work here: {error}")
    compiled = Compiled(model, "inductor")
    for form in (LowRank(4), FullRank(), Adapted(4, execution="merged")):
        dr.apply_plan(model, {"0": form})
        expected, found = gradients(model, model, x), gradients(model, compiled.call, x)
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two)
    assert compiled.count == 3


# Dynamic batch sizes and export.

EXPLICIT: list[Form] = [
    LowRank(4, execution="factored"), LowRank(4, execution="joined"), FullRank(),
    Adapted(4, execution="two-branch"), Adapted(4, execution="merged"),
]  # fmt: skip


@pytest.mark.parametrize("form", [*EXPLICIT, LowRank(4), Adapted(4)], ids=str)
def test_dynamic_batches(form: Form) -> None:
    """Two compilations serve every batch size, one more where the batch decides how to compute."""
    model = mlp()
    dr.apply_plan(model, {"0": form})
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (8, 9, 33, 64, 128, 5):
        x = torch.randn(rows, 16)
        assert_close(call(x), model(x))
    decides = form not in EXPLICIT or form == Adapted(4, execution="merged")
    assert counter.frame_count <= (4 if decides else 2)


@pytest.mark.parametrize("form", EXPLICIT, ids=str)
def test_export_with_a_dynamic_batch(form: Form) -> None:
    model = mlp()
    dr.apply_plan(model, {"0": form})
    with torch.no_grad():
        program = torch.export.export(
            model.eval(), (torch.randn(8, 16),), dynamic_shapes=({0: torch.export.Dim("rows")},)
        )
        for rows in (2, 50):
            x = torch.randn(rows, 16)
            assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("form", [LowRank(4), Adapted(4)], ids=str)
def test_export_of_a_fixed_batch(form: Form) -> None:
    model, x = mlp(), torch.randn(8, 16)
    dr.apply_plan(model, {"0": form})
    with torch.no_grad():
        assert_close(torch.export.export(model.eval(), (x,)).module()(x), model(x))
