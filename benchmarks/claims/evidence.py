"""Evidence: the blocks that are written from the records, and the answers before them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from benchmarks.training.harness.evidence import blocks
from benchmarks.training.harness.summary import FULL, Summaries
from benchmarks.training.harness.tables import around, digits

PAGE = "docs/evidence.md"
SETTINGS = (
    "95% intervals",
    "t-test at 5%",
    *("fixed 0.5 FLOPs", "narrower, 0.5", "shorter, 0.5", "decay 0.5", "full first 0.5"),
    "at no more than 0.65 of its FLOPs, with a last network of 0.6",
)
GPT, MLP, TABLE, RESNET = "gpt_characters", "mlp_256", "mlp_table", "resnet_fashion"
LOW = "paper, low-rank ending"


def claims() -> Iterator[str]:
    """Yield the blocks, then the sentences of the answers."""
    yield from blocks().values()
    yield from use()
    yield from convolutions()
    yield from answers()


def use() -> Iterator[str]:
    """Yield whether to use it."""
    yield (
        f"On the GPT a decay at {share(GPT, 'decay 0.65')} of the FLOPs ends at a loss of "
        f"{result(GPT, 'decay 0.65')}, fixed low rank of the same FLOPs at "
        f"{result(GPT, 'fixed 0.65 FLOPs')}, a narrower network at "
        f"{result(GPT, 'narrower, 0.65')}, full rank at {result(GPT, FULL)}."
    )
    yield (
        f"On the MLP of width 256 it is {result(MLP, 'decay 0.65')} % against "
        f"{result(MLP, 'fixed 0.65 FLOPs')}, {result(MLP, 'narrower, 0.65')} and "
        f"{result(MLP, FULL)}."
    )
    yield (
        f"On the GPT the narrower network takes {share(GPT, 'narrower, 0.65', 'memory_peak')} of "
        f"full rank's memory and {share(GPT, 'narrower, 0.65', 'cpu_seconds')} of its CPU seconds, "
        f"the decay of {share(GPT, 'decay 0.65')} takes "
        f"{share(GPT, 'decay 0.65', 'memory_peak')} and "
        f"{share(GPT, 'decay 0.65', 'cpu_seconds')}"
    )


def convolutions() -> Iterator[str]:
    """Yield what the ResNet says."""
    narrow = share(RESNET, "narrower, 0.5")
    yield (
        f"At {share(RESNET, 'decay 0.65')} a decay of the ResNet-8 has "
        f"{result(RESNET, 'decay 0.65')} %, fixed low rank {result(RESNET, 'fixed 0.65 FLOPs')}; "
        f"a narrower network has {result(RESNET, 'narrower, 0.5')} at {narrow}, full rank "
        f"{result(RESNET, FULL)}."
    )
    yield f"a narrower network at {narrow}, worse by {behind(RESNET, 'narrower, 0.5')} points"
    yield f"the paper's order with a low-rank ending is worse by {behind(RESNET, LOW)} points"
    yield f"at {share(RESNET, LOW)}."


def answers() -> Iterator[str]:
    """Yield the answers to the questions."""
    yield (
        f"On the GPT no: the nearest is a decay at {share(GPT, 'decay 0.65')} with a last network "
        f"of {last(GPT, 'decay 0.65')}, worse by {behind(GPT, 'decay 0.65')}."
    )
    yield (
        f"On the MLP of width 256 yes, by a decay at {share(MLP, 'decay 0.65')} with a last "
        f"network of {last(MLP, 'decay 0.65')}, worse by {behind(MLP, 'decay 0.65')}."
    )
    yield (
        f"The paper's order with a low-rank ending is worse by {behind(GPT, LOW)} on the GPT, at "
        f"{share(GPT, LOW)} of the FLOPs, and by {behind(MLP, LOW)} points on the MLP, at "
        f"{share(MLP, LOW)}"
    )
    first, eight = (share(MLP, arm, "cpu_seconds") for arm in ("full first 0.5", "decay 0.65"))
    yield f"at half of the FLOPs, takes {first} of full rank's CPU seconds, a decay at"
    yield (
        f"a decay at {share(MLP, 'decay 0.65')} takes {eight}, and on the GPT "
        f"{share(GPT, 'decay 0.65', 'cpu_seconds')}."
    )
    yield f"from {ranks(MLP, 0)} to {ranks(MLP, 1)} of the largest possible"
    yield (
        f"fixed low rank that spends the same FLOPs is better by "
        f"{behind(MLP, LOW, f'fixed as {LOW}')} points"
    )
    yield f"On the GPT it went from {ranks(GPT, 0)} to {ranks(GPT, 1)}"
    yield f"worse than the paper's order by {behind(GPT, f'fixed as {LOW}', LOW)}"


def ranks(name: str, place: int) -> str:
    """Return the mean effective rank at the start or the end of the paper's full-rank phase."""
    shares = around(found(name).arms[LOW])
    return f"{shares[place]:.2f}"


@cache
def found(name: str) -> Summaries:
    """Return the runs of an experiment."""
    return Summaries(name)


def result(name: str, arm: str) -> str:
    """Return mean and deviation of an arm's results."""
    one, places = found(name).arms[arm], digits(found(name))
    return f"{one.result:.{places}f} ± {one.spread:.{places}f}"


def share(name: str, arm: str, cost: str = "flops") -> str:
    """Return an arm's cost, relative to full rank."""
    return f"{found(name).share(arm, cost):.2f}"


def last(name: str, arm: str) -> str:
    """Return the share of the FLOPs that the last step costs."""
    return f"{found(name).arms[arm].mean('end_flops'):.2f}"


def behind(name: str, arm: str, other: str = FULL) -> str:
    """Return by how much an arm is worse than another, with the standard error."""
    difference = found(name).difference(arm, other)
    assert difference is not None
    places = digits(found(name))
    return f"{-difference.mean:.{places}f} (s.e. {difference.error:.{places}f})"
