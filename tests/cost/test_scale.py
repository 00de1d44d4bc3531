"""Phases and transitions in several processes, and the recorded tables of docs/scale.md."""

from __future__ import annotations

import json

import pytest
import torch
from documents import ROOT
from torch import nn

from dynarank import Adapted, FullRank, LowRank
from dynarank.cost import cost_schedule, trace
from dynarank.cost.process_layout import ProcessLayout
from dynarank.cost.scale import Cluster, PhaseAtScale, at_scale, decomposition_flops
from dynarank.forms import Form
from dynarank.layers import WeightSpec

RECORDED = ROOT / "benchmarks" / "scale" / "results" / "2026-11-29"
WEIGHT = WeightSpec("weight", (64, 128))


def phases(layout: ProcessLayout, *forms: Form) -> tuple[PhaseAtScale, ...]:
    """Phases of a step each, of five linear layers of which the last is twice as large."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 128))
        use, layers = trace(model, torch.ones(8, 64)), list("01234")
    plan = lambda clock, _: dict.fromkeys(layers, forms[clock.step])  # noqa: E731
    return at_scale(model, use, cost_schedule(use, plan, layers, len(forms)), layout)


def test_layers_are_dealt_in_rounds_that_wait_for_their_costliest() -> None:
    _, found = phases(ProcessLayout(1, 2), FullRank(), LowRank(8))
    move, small = found.transition, 11 * 64**3 + 2 * 64 * 64 * 8
    assert move
    large = small + 2 * 64**3 + 2 * 64 * 64 * 8
    assert (move.layers, move.rounds) == (5, 3)
    assert move.flops == 4 * small + large
    assert move.longest == large + small + small
    assert move.gathered == 0
    assert move.broadcast == 3 * 4 * (4 * 8 * 128 + 8 * 192)  # factors and two moments, fp32
    assert move.held == 3 * 4 * (64 * 128 + 8 * 192)
    _, alone = phases(ProcessLayout(5, 2), FullRank(), LowRank(8))
    assert alone.transition and alone.transition.longest == large
    assert alone.transition.gathered == 3 * 4 * (4 * 64 * 64 + 64 * 128)


def test_a_weight_that_becomes_a_base_is_not_sent() -> None:
    _, found = phases(ProcessLayout(8), FullRank(), Adapted(8))
    move = found.transition
    assert move and (move.flops, move.broadcast) == (0, 3 * 4 * (4 * 8 * 128 + 8 * 192))
    cluster = Cluster(per_node=4, node_bandwidth=400.0, network_bandwidth=10.0)
    received, sent = move.gathered * 7 / 8 / 10, move.broadcast / 40
    assert move.communication_seconds(cluster, ProcessLayout(8)) == pytest.approx(received + sent)


def test_the_first_phase_and_layers_that_stay_cost_no_transition() -> None:
    first, same = phases(ProcessLayout(1, 2), LowRank(8), LowRank(0.25))
    assert first.transition is None
    assert same.transition and same.transition.layers == 1  # 0.25 is rank 8 but in the last layer


@pytest.mark.parametrize(
    ("before", "after", "flops"),
    [
        (FullRank(), FullRank(), 0),
        (FullRank(), Adapted(8), 0),
        (LowRank(8), FullRank(), 2 * 64 * 128 * 8),
        (Adapted(8), FullRank(), 2 * 64 * 128 * 8),
        (FullRank(), LowRank(8), 2 * 64**2 * 128 + 9 * 64**3 + 2 * 64 * 128 * 8),
        (LowRank(8), LowRank(4), 4 * 192 * 8**2 + 22 * 8**3),
        (LowRank(4), LowRank(8), 2 * 64**2 * 128 + 9 * 64**3 + 2 * 64 * 128 * (4 + 8)),
    ],
    ids=str,
)
def test_flops_of_a_change(before: Form, after: Form, flops: int) -> None:
    assert decomposition_flops(WEIGHT, before, after) == flops


def test_a_decomposition_of_unknown_cost_is_refused_by_name() -> None:
    conv = WeightSpec("weight", (64, 64, 3, 3))
    with pytest.raises(ValueError, match="'tucker' decomposition are not known"):
        decomposition_flops(conv, FullRank(), LowRank(8, "tucker"))


def test_a_ring_leaves_a_machine_by_all_adapters_of_its_group() -> None:
    cluster = Cluster(per_node=8, node_bandwidth=400.0, network_bandwidth=10.0)
    assert cluster.shard_seconds(400, ProcessLayout(8, 4)) == 1  # within a machine
    assert cluster.shard_seconds(80, ProcessLayout(32)) == 1  # 8 adapters
    assert cluster.replica_seconds(80, ProcessLayout(1, 32)) == 1
    assert cluster.replica_seconds(10, ProcessLayout(8, 4)) == 1  # one GPU of each machine
    assert cluster.replica_seconds(400, ProcessLayout(2, 4)) == 1  # four replicas on one machine
    assert cluster.replica_seconds(20, ProcessLayout(4, 4)) == 1  # two on each
    with pytest.raises(ValueError, match="utilization is 0"):
        Cluster(utilization=0)


@pytest.mark.parametrize("model", ["7B", "70B"])
def test_the_tables_of_the_documentation_are_the_recorded_ones(model: str) -> None:
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    tables = (RECORDED / f"llama-{model}.md").read_text("utf-8").strip().split("\n\n")
    assert len(tables) == 3 and all(one in page for one in tables)


@pytest.mark.slow
def test_the_recorded_figures_are_what_the_command_gives() -> None:
    pytest.importorskip("transformers")
    from benchmarks.scale.llama import MODELS, rows

    recorded = json.loads((RECORDED / "llama.json").read_text("utf-8"))["7B"]
    assert next(rows(MODELS["7B"])) == recorded[0]
