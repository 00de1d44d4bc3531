from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from every_layer import KINDS, Kind
from faults import some
from small_run import assert_same_bits
from torch import nn
from torch.optim import Optimizer

import dynarank as dr

# Every layer, in every form, is saved and loaded into a plain model, and trains on alike.

DECOMPOSITIONS = some(["svd", "tucker"], ["cp"])


def trained(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Optimizer:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    steps(model, optimizer, inputs)
    return optimizer


def steps(model: nn.Module, optimizer: Optimizer, inputs: tuple[torch.Tensor, ...]) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_layer_is_loaded_into_a_plain_model(
    kind: Kind, decomposition: str, tmp_path: Path
) -> None:
    inputs = kind.inputs()
    for form in (dr.LowRank(2, decomposition), dr.Adapted(1, decomposition, alpha=3.0)):
        model, fresh = kind.make(), kind.make()
        paths = [s.path for s in dr.survey(model) if s.form is not None]
        try:
            dr.apply_plan(model, dict.fromkeys(paths, form))
        except ValueError:
            pytest.skip("the layer has no such decomposition")
        optimizer = trained(model, inputs)
        dr.save(tmp_path / "run", model=model, optimizer=optimizer)
        with torch.no_grad():
            for p in fresh.parameters():
                p.add_(1)
        other = torch.optim.AdamW(fresh.parameters(), lr=3.0)
        dr.load(tmp_path / "run", model=fresh, optimizer=other)
        for one, two in ((model, optimizer), (fresh, other)):
            steps(one, two, inputs)
            dr.inflate(one, optimizer=two)
            steps(one, two, inputs)
        assert_same_bits(fresh.state_dict(), model.state_dict())
        assert_same_bits(other.state_dict(), optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture_is_loaded_into_a_plain_model(
    architecture: Architecture, tmp_path: Path
) -> None:
    model, fresh, batch = architecture.build(), architecture.build(), architecture.batch()
    dr.deflate(dr.inflate(dr.factorize(model, 2)), alpha=2.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    dr.save(tmp_path / "run", model=model)
    dr.load(tmp_path / "run", model=fresh)
    for tied in (architecture.tied,) if architecture.tied else ():
        assert len({id(fresh.get_submodule(path).weight) for path in tied}) == 1
    model.eval(), fresh.eval()
    assert torch.equal(architecture.logits(fresh, batch), architecture.logits(model, batch))
