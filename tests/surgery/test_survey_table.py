"""The survey prints as a table of 80 columns, and stays a list."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, Architecture
from torch import nn

import dynarank as dr
from dynarank.cost.flops import trace
from dynarank.surgery.site import Site


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("rank", [None, 0.5])
def test_it_fits_and_prints_every_weight(arch: Architecture, rank: float | None) -> None:
    table = dr.survey(arch.build(), rank)
    assert isinstance(table, list) and all(isinstance(site, Site) for site in table)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80 and repr(table) == str(table)
    rows = re.findall(r"^\S+(?: +x(\d+))?\s+\d+x\d+", str(table), re.MULTILINE)
    assert sum(int(times or 1) for times in rows) == len(table)


def test_like_blocks_are_one_line() -> None:
    lines = str(dr.survey(BY_NAME["llama"].build(), 0.5)).splitlines()
    row = lines.index("model.layers.{0..1}.mlp.down_proj x2") + 1  # too long for its column
    assert lines[row] == f"{'':33}32x64          low-rank 10     0.469x  0.469x"


def test_no_two_layers_look_the_same() -> None:
    model = nn.Transformer(32, 4, 1, 2, 64, batch_first=True)
    lines = str(dr.survey(model, 0.5)).splitlines()
    attention = [line for line in lines if line.endswith("in_proj_weight x2")]
    paths = "self_attn.in_proj_weight x2", "multihead_attn.in_proj_weight x2"
    assert attention == [f"decoder.layers.{{0..1}}.{path}" for path in paths]


def test_what_it_says_is_what_factorize_does() -> None:
    model = BY_NAME["bert"].build()
    asked = str(dr.survey(model, 0.5))
    assert dr.current_plan(model)["bert.encoder.layer.0.output.dense"] == dr.FullRank()
    full = sum(p.numel() for p in model.parameters())
    done = dr.survey(dr.factorize(model, 0.5))
    assert str(done) == asked
    share = sum(p.numel() for p in model.parameters()) / full
    assert f"the model: {share:.3f}x of {full:,} parameters" in asked


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp", "separable"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_flops_are_those_of_a_trace(decomposition: str, kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(nn.ReLU(), kind(16, 24, 3, stride=2, padding=1, groups=2))
    line = str(dr.survey(model, 0.3, decomposition=decomposition)).splitlines()[1]
    x = torch.ones(1, 16, 64, 64, requires_grad=True)
    full = trace(model, x).flops({}).training
    low = trace(dr.factorize(model, 0.3, decomposition=decomposition), x).flops({}).training
    assert float(line.split()[-1][:-1]) == pytest.approx(low / full, rel=0.05)


def test_the_reasons() -> None:
    sides = [(64, 64), (64, 17), (17, 30)]
    model = nn.Sequential(nn.EmbeddingBag(20, 64), *(nn.Linear(*side) for side in sides))
    table = str(dr.survey(model, 16))
    assert "EmbeddingBag layers are not" in table and "low-rank 16" in table
    assert "no cheaper at rank 16" in table and "(break-even 13.4)" in table
    assert "last linear: taken as output" in table
    assert "not in layers" in str(dr.survey(model, 16, layers="1"))
    assert "others have factors already" in str(dr.survey(dr.factorize(model, 16, layers="1"), 8))


def test_weights_that_cannot_change_form_have_a_shape_and_a_teaching_error() -> None:
    sites = {site.path: site for site in dr.survey(BY_NAME["vit"].build())}
    assert sites["vit.embeddings.cls_token"].shape == (1, 1, 32)
    root = nn.Module()
    root.register_parameter("scale", nn.Parameter(torch.ones(3, 4)))
    (site,) = dr.survey(root)
    assert (site.path, site.shape) == ("scale", (3, 4))
    with pytest.raises(ValueError, match="'scale' cannot change form: Module layers are not"):
        site.effective()
    assert "Module layers are not handled" in str(dr.survey(root))


def test_an_empty_model() -> None:
    assert str(dr.survey(nn.ReLU())).splitlines()[1:] == ["no weight with factors; 0 parameters"]
