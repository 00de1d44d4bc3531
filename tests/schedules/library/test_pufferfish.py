from __future__ import annotations

import pytest

from dynarank import FullRank, LowRank, Rank
from dynarank.schedules import Clock, Pufferfish, Readings, get_preset, pufferfish, timeline

FULL = FullRank()
# A ResNet-18 for CIFAR without its shortcuts: the stem, 16 convolutions and the classifier.
WIDTHS = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
NAMES = ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2))]
RESNET = {
    name: (out, ins, 3, 3) for name, out, ins in zip(NAMES, WIDTHS, [3, *WIDTHS[:-1]], strict=True)
} | {"linear": (10, 512)}


def test_resnet_18_on_cifar_10_by_hand() -> None:
    """Epochs 0 to 79 of 300 full-rank; then the stem, the first block and the classifier stay so,

    and the rank of the others is a quarter of min(out, 9 in): 16, 32, 64, 128 for the four widths.
    """
    phases = timeline(pufferfish(), Readings(RESNET), 300 * 391)
    assert [(phase.start / 391, phase.steps / 391) for phase in phases] == [(0, 80), (80, 220)]
    assert set(phases[0].plan.values()) == {FULL}
    plan = phases[1].plan
    kept = [path for path, form in plan.items() if form == FULL]
    assert kept == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "linear"]
    assert list(plan) == list(RESNET)
    form = plan["layer1.1.conv1"]
    assert form == LowRank(Rank(0.25, of="min"))
    assert {plan[path] for path in RESNET if path not in kept} == {form}


def test_the_layers_kept_are_counted_among_those_scheduled() -> None:
    schedule = Pufferfish(2, switch=3, first=1, last=1)
    layers = Readings(dict.fromkeys("abcd", (8, 8)))
    assert schedule(Clock(2, 9), layers) == dict.fromkeys("abcd", FULL)
    low = LowRank(2)
    assert schedule(Clock(3, 9), layers) == {"a": FULL, "b": low, "c": low, "d": FULL}
    half = Pufferfish(2, switch=3, first=0.5, last=0.24)  # 2 of 4, and less than one
    assert half(Clock(3, 9), layers) == {"a": FULL, "b": FULL, "c": low, "d": low}
    few = Readings(dict.fromkeys("ab", (8, 8)))
    with pytest.raises(ValueError, match="of 2 layers the first 1 and the last 1 stay full-rank"):
        schedule(Clock(8, 9), few)
    none = Pufferfish(2, switch=3, first=0, last=0)
    assert set(none(Clock(3, 9), few).values()) == {low}


def test_the_preset_takes_another_rank() -> None:
    made = get_preset("pufferfish")(rank=0.5, alpha=16.0, decomposition="tucker", deflate=0.8)
    assert made == pufferfish(0.5, decomposition="tucker")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="start"):
        pufferfish(switch=1.5)
    with pytest.raises(ValueError, match="first=-1"):
        pufferfish(first=-1)
    with pytest.raises(ValueError, match=r"last=1\.5"):
        pufferfish(last=1.5)
