"""The tables of docs/scale.md, from the rows that `llama.py` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

GPUS = (8, 64, 256, 1000)
FORMS = ("full-rank", "low-rank, 1/2", "low-rank, 1/4", "adapted, 1/2", "adapted, rank 64")


def gigabytes(size: float) -> str:
    """Decimal, with one digit."""
    return f"{size / 1e9:,.1f}"


def seconds(time: float) -> str:
    """With two digits."""
    return f"{time:.2g}" if time < 10 else f"{time:,.0f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def found(data: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The first phase with these properties."""
    return next(one for one in data if all(one[key] == value for key, value in wanted.items()))


def phase_tables(data: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Memory, then communication and computation of a step."""
    columns = [("DDP", 8), *(("FSDP2", gpus) for gpus in GPUS)]
    head = ["GB per GPU", "DDP", *(f"FSDP2, {gpus:,}" for gpus in GPUS)]
    yield table(head, [
        [form, *(gigabytes(found(data, layout=kind, gpus=gpus, form=form)["memory"]["total"])
                 for kind, gpus in columns)]
        for form in FORMS
    ])  # fmt: skip
    kinds = ("DDP", "FSDP2", "HSDP")
    body: list[list[str]] = []
    for form in FORMS:
        ones = [found(data, layout=kind, gpus=256, form=form) for kind in kinds]
        body.append([
            form, seconds(ones[0]["compute_seconds"]), gigabytes(ones[0]["traffic"]["all_reduced"]),
            gigabytes(ones[1]["traffic"]["all_gathered"]),
            gigabytes(ones[1]["traffic"]["reduce_scattered"]),
            *(seconds(one["communication_seconds"]) for one in ones),
        ])  # fmt: skip
    yield table(
        ["256 GPUs, a step", "compute, s", "DDP: all-reduced, GB", "FSDP2: all-gathered, GB",
         "FSDP2: reduce-scattered, GB", "DDP, s", "FSDP2, s", "HSDP, s"], body
    )  # fmt: skip


def transition_table(data: Sequence[dict[str, Any]]) -> list[str]:
    """What each transition takes, under FSDP2."""
    body: list[list[str]] = []
    changes = dict.fromkeys((one["before"], one["form"]) for one in data if one["before"])
    for before, after in changes:
        names = {"before": before, "form": after}
        ones = [found(data, layout="FSDP2", gpus=gpus, **names)["transition"] for gpus in GPUS]
        body.append([
            f"{before} to {after}",
            *(seconds(one["decomposition_seconds"]) for one in ones),
            gigabytes(ones[2]["gathered"]), gigabytes(ones[2]["broadcast"]),
            seconds(ones[2]["communication_seconds"]), gigabytes(ones[2]["held"]),
        ])  # fmt: skip
    return table(
        ["transition", *(f"{gpus:,} GPUs, s" for gpus in GPUS), "gathered, GB", "broadcast, GB",
         "sent in, s", "held, GB"], body
    )  # fmt: skip


def tables(data: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Memory, a step, transitions."""
    yield from phase_tables(data)
    yield transition_table(data)
