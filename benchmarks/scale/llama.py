"""Llama-2 7B and 70B on 8 to 1,000 GPUs: memory, communication and transitions, by the cost model.

    python -m benchmarks.scale.llama --out benchmarks/scale/results/2026-11-29

Nothing is trained or measured: models are built on the meta device, and ``dynarank.cost.scale``
computes from their shapes, whatever the machine. The tables are those of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from dynarank.cost import cost_schedule, trace
from dynarank.cost.process_layout import ProcessLayout
from dynarank.cost.scale import Cluster, PhaseAtScale, at_scale
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.scheduler.rank_scheduler import scheduled_layers
from dynarank.schedules import low_rank
from dynarank.schedules.phases import Phases
from dynarank.surgery.sites import survey

from .tables import FORMS, GPUS, tables

TOKENS = 4096  # of a micro-batch of one process: one sequence
NODE = 8  # GPUs of a machine, and the shards of HSDP
BF16, FP32 = 2, 4
MODELS = {
    "7B": hf.LlamaConfig(),
    "70B": hf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
}  # fmt: skip
HALF, QUARTER = LowRank(0.5), LowRank(0.25)
NAMES: dict[Form, str] = dict(
    zip((FullRank(), HALF, QUARTER, Adapted(0.5), Adapted(64)), FORMS, strict=True)
)
# The paper's order, a decay in two cuts, and a small adapter at the end.
ORDERS: tuple[tuple[Form, ...], ...] = (
    (HALF, FullRank(), Adapted(0.5)),
    (FullRank(), HALF, QUARTER),
    (FullRank(), Adapted(64)),
)


def layouts(units: tuple[str, ...]) -> Iterator[tuple[str, ProcessLayout]]:
    """DDP, FSDP2 and HSDP on each number of GPUs: fp32 weights, computed and gathered in bf16."""
    for gpus in GPUS:
        sharded = {"units": units, "gather_itemsize": BF16, "reduce_itemsize": FP32}
        yield "DDP", ProcessLayout(1, gpus)
        yield "FSDP2", ProcessLayout(gpus, 1, **sharded)  # type: ignore[arg-type]
        yield "HSDP", ProcessLayout(NODE, gpus // NODE, **sharded)  # type: ignore[arg-type]


def rows(config: hf.LlamaConfig) -> Iterator[dict[str, Any]]:
    """One phase of one order under one layout, as plain data."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.zeros(1, 1, TOKENS, TOKENS)
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    use = trace(model, batch, lambda output: output.logits.sum())
    layers = [site.path for site in scheduled_layers(survey(model), low_rank(0.5), 1)]
    units = tuple(f"model.layers.{i}" for i in range(config.num_hidden_layers))
    for order in ORDERS:
        cost = cost_schedule(use, Phases(range(len(order)), order), layers, len(order))
        for kind, layout in layouts(units):
            found = at_scale(model, use, cost, layout)
            for place, phase in enumerate(found):
                before = NAMES[order[place - 1]] if place else ""
                yield row(kind, layout, before, NAMES[order[place]], phase)


def row(
    kind: str, layout: ProcessLayout, before: str, form: str, one: PhaseAtScale
) -> dict[str, Any]:
    """A phase as plain data."""
    cluster, move = Cluster(), one.transition
    data: dict[str, Any] = {
        "layout": kind, "gpus": layout.processes, "before": before, "form": form,
        "memory": asdict(one.memory) | {"total": one.memory.total},
        "traffic": asdict(one.traffic) | {"sent": sum(one.traffic.sent(layout))},
        "training_flops": one.cost.flops.training,
        "compute_seconds": one.compute_seconds(cluster),
        "communication_seconds": one.communication_seconds(cluster, layout),
    }  # fmt: skip
    if move:
        data["transition"] = asdict(move) | {
            "decomposition_seconds": move.decomposition_seconds(cluster),
            "communication_seconds": move.communication_seconds(cluster, layout),
        }
    return data


def main() -> None:
    """Write the figures and the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    data = {name: list(rows(config)) for name, config in MODELS.items()}
    lines = {name: ",\n".join(map(json.dumps, one)) for name, one in data.items()}
    text = ",\n".join(f'"{name}": [\n{one}\n]' for name, one in lines.items())
    (out / "llama.json").write_text(f"{{\n{text}\n}}\n")
    for name, one in data.items():
        text = "\n\n".join("\n".join(lines) for lines in tables(one)) + "\n"
        (out / f"llama-{name}.md").write_text(text)
        print(name, text, sep="\n\n")


if __name__ == "__main__":
    main()
