"""What a spectrum says about a cut is what the cut does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stored import random, write
from torch import Tensor, nn

import dynarank as dr
from dynarank.files.reading import DamagedFileError
from dynarank.form_data import read_plan
from dynarank.monitors.file_spectra import read_spectrum
from dynarank.monitors.rank_advice import (
    RankAdvice,
    advise,
    break_even_rank,
    plan_text,
    suggested_plan,
    summary_lines,
)
from dynarank.monitors.stored_weight import StoredWeight
from dynarank.monitors.stored_weights import role_of, survey_files
from dynarank.monitors.weight_files import open_weights


def advice_on(folder: Path, energy: float) -> list[RankAdvice]:
    files = open_weights(folder)
    found: list[RankAdvice] = []
    for weight in survey_files(files).weights:
        values = read_spectrum(files, weight).values
        assert values is not None
        found.append(advise(weight, values, energy, role_of(weight, files)))
    return found


@pytest.mark.parametrize(("n", "m"), [(2, 2), (1, 9), (16, 16), (64, 3), (768, 3072), (50, 51)])
def test_the_break_even_rank_is_the_last_that_is_smaller(n: int, m: int) -> None:
    rank = break_even_rank(n, m)
    assert rank * (n + m) < n * m <= (rank + 1) * (n + m)


def decaying(module: nn.Module) -> nn.Module:
    """Weights whose spectrum falls, some faster than others."""
    torch.manual_seed(0)
    for index, parameter in enumerate(p for p in module.parameters() if p.ndim > 1):
        with torch.no_grad():
            left, values, right = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
            values = torch.arange(1, len(values) + 1) ** (-0.4 * ((index + 3) % 5))
            parameter.copy_(((left * values) @ right).view_as(parameter))
    return module


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=300, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "gpt2": gpt2,
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 1),
        nn.ConvTranspose2d(32, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3),
    ),
    "recurrent": lambda: nn.ModuleDict({"rnn": nn.LSTM(64, 64, 2), "fc": nn.Linear(64, 64)}),
    "attention": lambda: nn.ModuleDict({"a": nn.MultiheadAttention(64, 2)}),
    "low-rank": lambda: dr.factorize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), 24,
                                     layers="*"),
}  # fmt: skip


@pytest.mark.parametrize("energy", [0.9, 0.99])
@pytest.mark.parametrize("kind", MODELS)
def test_the_suggested_plan_does_what_it_says(kind: str, energy: float, tmp_path: Path) -> None:
    model = decaying(MODELS[kind]()) if kind != "low-rank" else MODELS[kind]()
    write(tmp_path, {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})
    advice = advice_on(tmp_path, energy)
    (tmp_path / "plan.json").write_text(plan_text(advice))
    plan = read_plan(tmp_path / "plan.json")
    assert plan or kind == "low-rank"
    before = {site.path: site.effective().detach().clone() for site in dr.survey(model)}
    count = sum(p.numel() for p in model.parameters())
    changes = dr.apply_plan(model, plan)
    assert {change.path for change in changes} == set(plan)
    after = {site.path: site.effective() for site in dr.survey(model)}
    for path in plan:
        assert kept(before[path], after[path]) >= energy - 1e-5
    saved = sum(one.saved for one in advice if one.weight.name in plan)
    assert count - sum(p.numel() for p in model.parameters()) == saved


def kept(before: Tensor, after: Tensor) -> float:
    lost = (after - before).detach().double().norm() / before.detach().double().norm()
    return 1 - float(lost) ** 2


def test_layers_where_no_rank_saves_are_not_in_the_plan(tmp_path: Path) -> None:
    low = torch.outer(random(40), random(30))
    weights = {
        "cut.weight": low,
        "full.weight": torch.randn(40, 30),
        "embed_tokens.weight": low,
        "lm_head.weight": low,
        "small.weight": low[:8],
        "mixer.A_log": low,
        "dw.weight": low[:, None, :9].reshape(40, 1, 3, 3),
        "norm.weight_g": torch.ones(40, 1),
        "norm.weight_v": low,
        "experts.up_proj": torch.stack([low, low]),
        "x.lora_A.weight": random(2, 40),
        "x.lora_B.weight": random(40, 2),
    }
    write(tmp_path, weights)
    advice = advice_on(tmp_path, 0.99)
    assert list(suggested_plan(advice)) == ["cut"]
    told = {one.weight.name: one.verdict for one in advice}
    assert told["cut"] == "cut to 1: -94%" and told["full"].startswith("keep: ")
    assert told["embed_tokens"] == "leave: embedding" and told["lm_head"] == "leave: head"
    assert told["small"] == "leave: small" and told["dw"] == "leave: depthwise"
    assert told["x"] == "leave: LoRA"


def test_grouped_convolutions_are_left(tmp_path: Path) -> None:
    low = torch.outer(random(64), torch.ones(288)).view(64, 32, 3, 3)
    write(tmp_path, {"conv1.weight": random(128, 64, 1, 1), "conv2.weight": low})
    told = {one.weight.name: one.verdict for one in advice_on(tmp_path, 0.99)}
    assert told["conv2"] == "leave: 4 groups"


def test_the_sum_says_what_a_reader_should_take_from_it() -> None:
    def one(values: Tensor) -> RankAdvice:
        return advise(StoredWeight("x", (64, 64), ("x",), tuple, 64 * 64), values, 0.99)

    low, flat = torch.ones(64) * (torch.arange(64) < 6), torch.ones(64)
    assert summary_lines([one(low), one(flat)]) == [
        "8,192 parameters in 2 weights; rank at 99% of the energy saves 3,328 (40.6%) in 1 of 2 "
        "layers.",
        "1 of 2 layers keeps 99% of its energy at half size.",
    ]
    assert summary_lines([one(flat)])[0].endswith("saves nothing.")
    assert "train low-rank instead" in summary_lines([one(flat)])[1]
    assert summary_lines([]) == []


def test_a_zero_weight_is_cut_to_one() -> None:
    weight = StoredWeight("x", (64, 64), ("x.weight",), tuple, 64 * 64)
    advice = advise(weight, torch.zeros(64), 0.99)
    assert suggested_plan([advice])["x"]["rank"] == 1 and advice.saved == 4096 - 128


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"form": "no"}}', '{"a": {}}',
                                  '{"a": {"form": "low-rank", "rank": 0}}'])  # fmt: skip
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_may_name_any_form(tmp_path: Path) -> None:
    plan = {"0": {"form": "adapted", "rank": 2}, "1": {"form": "full-rank"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert [c.path for c in dr.apply_plan(model, read_plan(tmp_path / "plan.json"))] == ["0"]
