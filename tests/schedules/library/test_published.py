from __future__ import annotations

import pytest

from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.schedules import Clock, Readings, get_preset, published, timeline
from dynarank.schedules.library.published import PUBLISHED_ALPHAS

LAYERS = Readings({"a": (16, 16)})
HALF = Rank(0.5, of="out")


def test_the_epochs_of_cifar_10() -> None:
    """55 epochs low-rank, 65 full-rank, 30 adapted, of 150 epochs of 390 steps."""
    phases = timeline(published(), LAYERS, 150 * 390)
    assert [phase.steps / 390 for phase in phases] == [55, 65, 30]
    forms = [phase.plan["a"] for phase in phases]
    assert forms == [LowRank(HALF), FullRank(), Adapted(HALF, alpha=16.0, execution="two-branch")]


def test_the_epochs_of_cifar_100() -> None:
    phases = timeline(published(inflate=80 / 200, deflate=170 / 200), LAYERS, 200 * 390)
    assert [phase.steps / 390 for phase in phases] == [80, 90, 30]


@pytest.mark.parametrize(
    ("decomposition", "rank", "scale"),
    [("svd", 8, 2.0), ("tucker", 16, 0.0625), ("separable", 32, 2.0), ("cp", 8, 2.0)],
)
def test_the_scales_of_the_published_resnet_20(decomposition: str, rank: int, scale: float) -> None:
    """SVD 16 / 8, Tucker 1 / 16, what is called CP there 64 / 32; ours of the true CP 16 / 8."""
    last = published(rank, decomposition=decomposition).last
    assert isinstance(last, Adapted)
    assert last.scale == scale
    assert decomposition == "cp" or last.alpha == PUBLISHED_ALPHAS[decomposition]


def test_the_preset_does_not_take_another_alpha() -> None:
    made = get_preset("published")(rank=4, alpha=3.0, execution="merged", inflate=0.1, deflate=0.2)
    plan = made(Clock(9, 10), LAYERS)
    assert plan == {"a": Adapted(4, alpha=16.0, execution="two-branch")}
