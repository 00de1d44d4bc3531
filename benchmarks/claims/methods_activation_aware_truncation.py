"""Activation-aware truncation: losses after a cut, and a trained encoder."""

from __future__ import annotations

from collections.abc import Iterator

from .methods_shared import number, row, spread
from .records import Row, mean, read_json, values

PAGE = "docs/methods/activation-aware-truncation.md"
SETTINGS: tuple[str, ...] = ()
ENDINGS = "training/results/2026-11-24-low-rank-ending"
SHARES = {0.125: "1/8", 0.25: "1/4", 0.5: "1/2"}
ARMS = ("plain", "whitened", "budgeted")


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    digits = read_json(f"{ENDINGS}/digits.json")["runs"]
    files = [f"{ENDINGS}/cifar10-resnet20-seed{seed}.json" for seed in range(3)]
    resnet = [run for file in files for run in read_json(file)["runs"]]
    every = [values(digits, "loss_after", arm=arm, share=s) for arm in ARMS for s in SHARES]
    every += [values(resnet, "loss_after", arm=arm, share=s) for arm in ARMS for s in SHARES]
    yield f"right after truncation, {number(*every)}, mean"
    yield from _table("digits-net", digits)
    yield from _table("ResNet-20, CIFAR-10 at 16 x 16", resnet)
    avoided = [_avoided(runs, share) for runs in (digits, resnet) for share in SHARES]
    yield f"avoids {min(avoided):.0f} to {max(avoided):.0f}% of the jump in loss"
    yield from _later(resnet)
    yield from _encoder()
    yield _without_norm()


def _table(network: str, runs: list[Row]) -> Iterator[str]:
    full = mean(values(runs, "loss_after", arm="full-rank"))
    for share, name in SHARES.items():
        cells = [spread(values(runs, "loss_after", arm=arm, share=share), 3) for arm in ARMS]
        yield row(network if name == "1/8" else "", name, f"{full:.3f}", *cells)


def _avoided(runs: list[Row], share: float) -> float:
    full = mean(values(runs, "loss_after", arm="full-rank"))
    plain = mean(values(runs, "loss_after", arm="plain", share=share))
    budgeted = mean(values(runs, "loss_after", arm="budgeted", share=share))
    return 100 * (plain - budgeted) / (plain - full)


def _later(runs: list[Row]) -> Iterator[str]:
    def loss(share: float, arm: str) -> str:
        return spread(values(runs, "loss_further", arm=arm, share=share), 3)

    plain = loss(0.25, "plain")
    yield f"ResNet-20 at 1/4 is at {plain} after plain truncation"
    yield f"and {loss(0.25, 'budgeted')} with budgeted ranks"
    yield f"at 1/2 at {loss(0.5, 'plain')} and {loss(0.5, 'budgeted')}."
    yield f"not better ({loss(0.25, 'whitened')} against {plain})"


def _encoder() -> Iterator[str]:
    rows = read_json("compression/results/2026-11-28-sentence-encoder/result.json")["rows"]
    yield f"| full rank | {rows[0]['forward_flops']:.2f}x | {rows[0]['spearman']:.3f} | | |"
    for name, first in (("1/2", 1), ("3/8", 4), ("1/4", 7)):
        three = rows[first : first + 3]
        flops = f"{three[0]['forward_flops']:.2f}x"
        yield row(name, flops, *(f"{one['spearman']:.3f}" for one in three))


def _without_norm() -> str:
    runs = read_json(f"{ENDINGS}/without-norm.json")["runs"]

    def loss(arm: str, **rank: int) -> str:
        return f"{mean(values(runs, 'loss', network='mlp', arm=arm, **rank)):.3f}"

    twelve, eight = (
        f"rank {rank}{of_all}: {loss('plain', rank=rank)} to {loss('calibrated', rank=rank)}"
        for rank, of_all in ((12, " of 64"), (8, ""))
    )
    return f"({twelve}, full rank {loss('full-rank')}; {eight}, within the spread)"
