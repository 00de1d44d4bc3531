"""The table behind the laws: layers, forms, dtypes and tolerances. A new method adds a row."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form
from dynarank.surgery.sites import survey

# Largest relative difference allowed, ||a - b|| / ||b||, for what is equal in exact arithmetic.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}

DECOMPOSITIONS = ["svd", "tucker", "cp", "separable"]


@dataclass(frozen=True)
class LayerCase:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input

    def __str__(self) -> str:
        return self.name


def _convs() -> Iterator[LayerCase]:
    options = itertools.product([1, (2, 1)], [0, (2, 1)], [1, 2])
    for i, (stride, padding, dilation) in enumerate(options):
        bias = i % 3 > 0
        yield LayerCase(
            f"conv-s{stride}-p{padding}-d{dilation}-b{bias:d}".replace(" ", ""),
            lambda s=stride, p=padding, d=dilation, b=bias: nn.Conv2d(
                6, 10, 3, stride=s, padding=p, dilation=d, bias=b
            ),
            (2, 6, 9, 8),
        )


LAYERS = [
    LayerCase("linear", lambda: nn.Linear(12, 10), (3, 12)),
    LayerCase("linear-tall", lambda: nn.Linear(5, 14, bias=False), (2, 4, 5)),
    LayerCase("conv-1x1", lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 5)),
    LayerCase("conv-tall", lambda: nn.Conv2d(1, 16, (3, 1), bias=False), (2, 1, 5, 5)),
    LayerCase(
        "conv-same", lambda: nn.Conv2d(6, 10, (3, 5), padding="same", dilation=(2, 1)), (2, 6, 7, 7)
    ),
    LayerCase("conv-valid", lambda: nn.Conv2d(6, 10, 3, padding="valid"), (2, 6, 7, 7)),
    LayerCase(
        "conv-circular",
        lambda: nn.Conv2d(6, 10, 3, stride=2, padding=(2, 1), padding_mode="circular"),
        (2, 6, 7, 7),
    ),
    LayerCase(
        "conv-reflect", lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 7)
    ),
    *_convs(),
    LayerCase("conv-uneven", lambda: nn.Conv2d(6, 10, (2, 4), padding="same"), (2, 6, 7, 7)),
    LayerCase("conv-grouped", lambda: nn.Conv2d(6, 12, 3, padding=1, groups=2), (2, 6, 6, 5)),
    LayerCase(
        "conv-depthwise", lambda: nn.Conv2d(6, 18, 3, stride=2, padding=1, groups=6), (2, 6, 7, 7)
    ),
    LayerCase(
        "conv-1d",
        lambda: nn.Conv1d(6, 10, 3, stride=2, padding=2, dilation=2, padding_mode="replicate"),
        (2, 6, 11),
    ),
    LayerCase("conv-3d", lambda: nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
    LayerCase("transposed-1d", lambda: nn.ConvTranspose1d(6, 10, 4, stride=3), (2, 6, 5)),
    LayerCase(
        "transposed-2d",
        lambda: nn.ConvTranspose2d(
            6, 10, (3, 2), stride=2, padding=1, output_padding=(1, 0), groups=2, dilation=(2, 1)
        ),
        (2, 6, 4, 5),
    ),
    LayerCase(
        "transposed-3d", lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, bias=False), (2, 4, 3, 2, 2)
    ),
    LayerCase("conv-unbatched", lambda: nn.Conv2d(6, 10, 3, padding=1), (6, 7, 7)),
    LayerCase("gpt2-conv1d", lambda: Conv1D(10, 12), (3, 12)),
]

DTYPES = [torch.float64, torch.float32]


# What every decomposition is tried on; SVD on all layers.
SHARED = [
    case
    for case in LAYERS
    if case.name
    in ("linear", "conv-same", "conv-s(2,1)-p(2,1)-d2-b1", "conv-grouped", "conv-1d", "conv-3d",
        "transposed-2d", "gpt2-conv1d")
]  # fmt: skip


def forms(decomposition: str, rank: int = 3) -> list[Form]:
    """Every form and every way to run it."""
    return [
        FullRank(),
        LowRank(rank, decomposition, execution="factored"),
        LowRank(rank, decomposition, recompute=True),
        LowRank(rank, decomposition, execution="joined"),
        Adapted(rank, decomposition),
        Adapted(rank, decomposition, execution="merged"),
        Adapted(rank, decomposition, execution="merged", recompute=True),
        Adapted(rank, decomposition, execution="two-branch", recompute=True),
        Adapted(rank, decomposition, alpha=3.0, execution="two-branch"),
    ]


ALL_FORMS = forms("svd")
CASES = [(case, form) for case in LAYERS for form in ALL_FORMS] + [
    (case, form) for name in DECOMPOSITIONS[1:] for case in SHARED for form in forms(name)[1:]
]
# Where it does not matter how a form computes, only what its weight is.
WEIGHTS = [
    (case, form)
    for case, form in CASES
    if form != FullRank() and form.execution in ("factored", "merged") and not form.recompute
]
LAYER_AND_DECOMPOSITION = [(case, "svd") for case in LAYERS] + [
    (case, name) for name in DECOMPOSITIONS[1:] for case in SHARED
]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Relative difference in the Frobenius norm, within the table's tolerance for the dtype."""
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.double() - expected.double()).norm().item()
    scale = max(expected.double().norm().item(), 1e-30)
    assert difference <= limit * scale, (
        f"relative difference {difference / scale:.1e} > {limit:.0e}"
    )


def randomize(module: nn.Module, seed: int = 1) -> None:
    """Fill every parameter, adapters too, so that no term of a law is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)


def fitting(model: nn.Module, form: Form) -> Form:
    """The form at the most this rank that the layer allows."""
    (site,) = survey(model)
    if isinstance(form, FullRank):
        return form
    limit = site.spec.decomposition(form).limit(site.shape)
    return replace(form, rank=min(int(form.rank), limit))  # type: ignore[arg-type]


# Over random sequences of changes, with an optimizer.

any_form = st.one_of(
    st.just(FullRank()),
    st.builds(LowRank, st.integers(1, 5), st.sampled_from(DECOMPOSITIONS)),
    st.builds(
        Adapted,
        st.integers(1, 5),
        st.sampled_from(DECOMPOSITIONS),
        alpha=st.sampled_from([1.0, 16.0]),
        execution=st.sampled_from(["auto", "merged", "two-branch"]),
        restart=st.integers(0, 2),
    ),
)
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
}


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Law 5: every trainable parameter once, none foreign, states that fit."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in trainable}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                assert value.shape == p.shape and value.dtype == p.dtype
                assert torch.isfinite(value).all()
    copied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copied)


def check_moments(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Law 6's bound, for parameters that a change has just made."""
    for p in parameters:
        state = optimizer.state.get(p, {})
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                assert (state[key] * (1 + 1e-9) >= state["exp_avg"].square()).all()
