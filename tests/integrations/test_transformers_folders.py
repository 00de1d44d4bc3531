"""``save_pretrained`` and ``from_pretrained`` of ranked models, tied weights among them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import bert, gpt2, masked, vit
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from warm_python import run as python

import dynarank as dr
import dynarank.integrations.transformers

IDS = torch.arange(2, 10)[None]


class Convolutional(PreTrainedModel):
    """Layers of other kinds, and a weight that trains by itself."""

    config_class = PreTrainedConfig
    base_model_prefix = "body"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(64, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.square = nn.Conv2d(8, 16, 3, padding=1)
        self.memory = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.shift = nn.Parameter(torch.ones(16))
        self.post_init()

    def forward(self, input_ids: Any) -> Any:
        x = self.convolution(self.words(input_ids).mT).mT
        x = (
            x
            + self.square(x.reshape(-1, 8, 2, x.shape[1])).reshape(x.shape[0], -1, 16)[
                :, : x.shape[1]
            ]
        )
        x = self.memory(x)[0] + self.shift
        return self.attention(x, x, x, need_weights=False)[0]


def convolutional(seed: int = 0) -> Convolutional:
    torch.manual_seed(seed)
    return Convolutional(PreTrainedConfig())


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(IDS)
    return found if isinstance(found, torch.Tensor) else found[0]


def trained(model: Any) -> Any:
    """The model with other values everywhere, as training leaves it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same forms and values, and train the same of them."""
    states = one.state_dict(), other.state_dict()
    assert [*states[0]] == [*states[1]]
    assert dr.current_plan(one) == dr.current_plan(other)
    trains = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (one, other)]
    assert trains[0] == trains[1]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


ALL = {"layers": "*"}
FORMS: dict[str, Callable[[Any], Any]] = {
    "low-rank": lambda m: dr.factorize(m, 2),
    "every layer": lambda m: dr.factorize(m, 2, layers="*"),
    "adapted": lambda m: dr.deflate(m, 2),
    "every layer adapted": lambda m: dr.deflate(m, 2, layers="*"),
    "inflated": lambda m: dr.inflate(dr.factorize(m, 2)),
}


@pytest.mark.parametrize(
    "make", [bert, masked, gpt2, convolutional], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("forms", FORMS)
def test_a_loaded_folder_is_the_model_that_was_saved(forms: str, make: Any, tmp_path: Path) -> None:
    model = trained(FORMS[forms](make()))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert same(loaded, model) and not any(info.values())
    torch.testing.assert_close(output(loaded), output(model))
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(loaded, "hf_quantizer") and not hasattr(loaded.config, "fusion_config")
    assert not loaded.training and loaded.float() is loaded


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp"])
def test_any_decomposition_is_rebuilt(decomposition: str, tmp_path: Path) -> None:
    model = convolutional()
    dr.factorize(model, 3, layers=["square"], decomposition=decomposition)
    dr.deflate(model, 3, layers=["convolution"], decomposition=decomposition, alpha=3.0)
    trained(model).save_pretrained(tmp_path)
    assert same(Convolutional.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_folders_in_parts_and_in_other_precisions(make: Any, tmp_path: Path) -> None:
    model = trained(
        dr.deflate(
            dr.factorize(make(), 2, layers="*.intermediate.*" if make is bert else "*c_fc"),
            2,
            layers=["*word_embeddings" if make is bert else "*wte"],
        )
    )
    model.save_pretrained(tmp_path, max_shard_size=3000)
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert same(type(model).from_pretrained(tmp_path), model)
    assert same(type(model).from_pretrained(tmp_path, device_map="cpu"), model)
    half = copy.deepcopy(model).bfloat16()
    assert same(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16), half)
    half.save_pretrained(tmp_path / "half")
    assert same(type(model).from_pretrained(tmp_path / "half"), half)


@pytest.mark.filterwarnings("ignore:.*meta device because they were offloaded")
def test_a_loaded_model_may_lie_on_the_disk(tmp_path: Path) -> None:
    model = trained(dr.deflate(bert(), 2))
    model.save_pretrained(tmp_path)
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "disk"}
    how = {"device_map": {**places, "classifier": "cpu"}, "offload_folder": tmp_path / "disk"}
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path, **how)), output(model))


def test_factors_may_have_a_precision_of_their_own(tmp_path: Path) -> None:
    model = dr.deflate(bert().bfloat16(), 2)
    for name, parameter in model.named_parameters():
        if name.endswith((".down", ".up")):
            parameter.data = parameter.data.float() + 0.1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[0].attention.self.query.up.dtype is torch.float32
    assert same(loaded, model)


def test_the_base_of_a_model_and_another_head_take_its_forms(tmp_path: Path) -> None:
    model = trained(dr.factorize(bert(), 2))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert same(base, model.bert)
    base.save_pretrained(tmp_path / "base")
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert same(headed.bert, model.bert)
    trained(dr.deflate(base, 2, layers="*")).save_pretrained(tmp_path / "tied")
    other = BertForMaskedLM.from_pretrained(tmp_path / "tied")
    assert other.cls.predictions.decoder.base is other.bert.embeddings.word_embeddings.base
    inner = base.state_dict()
    assert all(torch.equal(v, inner[n]) for n, v in other.bert.state_dict().items())
    with pytest.raises(ValueError, match="the folder of another model"):
        Convolutional.from_pretrained(tmp_path, config=_config(tmp_path))


def _config(folder: Path) -> PreTrainedConfig:
    found = json.loads((folder / "config.json").read_text())
    kept = {key: found[key] for key in ("quantization_config", "fusion_config")}
    return PreTrainedConfig(**kept)


def test_a_loaded_model_trains_on_and_is_saved_plain(tmp_path: Path) -> None:
    dr.deflate(gpt2(), 2).save_pretrained(tmp_path)
    model = type(gpt2()).from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    dr.merge(model, optimizer=optimizer)
    model.save_pretrained(tmp_path / "plain")
    assert "dynarank" not in (tmp_path / "plain" / "config.json").read_text()
    assert same(type(model).from_pretrained(tmp_path / "plain"), model)
    assert "_tied_weights_keys" not in vars(model)


def test_a_given_state_is_what_is_saved(tmp_path: Path) -> None:
    model, other = dr.factorize(bert(), 2), trained(dr.factorize(bert(), 3))
    plain = dr.merge(copy.deepcopy(other))
    model.save_pretrained(tmp_path, state_dict=plain.state_dict())
    assert same(type(model).from_pretrained(tmp_path), plain)
    model.save_pretrained(tmp_path, True, other.state_dict())
    assert same(type(model).from_pretrained(tmp_path), other)


def test_a_config_read_from_a_ranked_folder_says_nothing_of_another_model(tmp_path: Path) -> None:
    dr.factorize(gpt2(), 2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path / "plain")
    assert "dynarank" not in (tmp_path / "plain" / "config.json").read_text()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), model)
    dr.factorize(model, 3).save_pretrained(tmp_path / "other")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), model)
    assert "transformer.h.0.mlp.c_fc" in model.config.quantization_config["layers"]  # as it was


@pytest.mark.parametrize("forms", FORMS)
def test_files_have_the_names_that_the_model_has(forms: str, tmp_path: Path) -> None:
    model = trained(FORMS[forms](vit()))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(loaded, model)
    own = {*load_file(tmp_path / "model.safetensors")} == {*model.state_dict()}
    assert own == (forms != "inflated")  # a plain folder is transformers' own


def test_a_quantized_model_keeps_its_own_entry(tmp_path: Path) -> None:
    model = dr.factorize(bert(), 2)
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ValueError, match=r"config\.json can say one of both"):
        model.save_pretrained(tmp_path)
    assert model.config.quantization_config == {"quant_method": "other"}


def test_a_folder_that_lacks_values_is_refused(tmp_path: Path) -> None:
    model = dr.factorize(bert(), 2)
    state = model.state_dict()
    key = "bert.encoder.layer.0.attention.self.query.up"
    del state[key]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"the folder has no values for {key}"):
        type(model).from_pretrained(tmp_path)


def in_another_process(code: str, *args: object) -> str:
    head = "import sys, warnings, torch, dynarank as dr\n"
    done = python(["-c", head + code, *map(str, args)], cwd=Path(__file__).parents[1])
    return done.stdout + done.stderr


@pytest.mark.slow
def test_without_the_integration_nothing_is_silent(tmp_path: Path) -> None:
    dr.factorize(bert(), 2).save_pretrained(tmp_path / "ranked")
    code = """
from pretrained_models import bert
from transformers import BertForSequenceClassification
try: BertForSequenceClassification.from_pretrained(sys.argv[1] + "/ranked")
except ValueError as error: print("refused:", error)
model = dr.factorize(bert(), 2)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model.state_dict(); print("none" if not seen else seen)
    model.save_pretrained(sys.argv[1] + "/a"); print(len(seen), seen[-1].message)
    model.bert.save_pretrained(sys.argv[1] + "/b"); print(len(seen))
    dr.merge(model).save_pretrained(sys.argv[1] + "/c"); print(len(seen))
    import dynarank.integrations.transformers
    dr.factorize(model, 2).save_pretrained(sys.argv[1] + "/d"); print(len(seen))
"""
    said = in_another_process(code, tmp_path)
    assert "refused: Unknown fusion type: dynarank (before from_pretrained, `import dyn" in said
    lines = [line for line in said.splitlines() if line.startswith(("none", "1", "2"))]
    assert lines[0] == "none" and "dr.merge(copy.deepcopy(model))" in lines[1], said
    assert lines[1].startswith("1 ") and lines[2:] == ["2", "2", "2"], said


@pytest.mark.slow
def test_without_transformers_the_error_names_the_extra() -> None:
    code = """
sys.modules["transformers"] = None
try: import dynarank.integrations.transformers
except ImportError as error: print(error)
"""
    assert "pip install 'dynarank[hf]'" in in_another_process(code)


# ---- tied weights


def tied(form: str) -> Any:
    change = dr.factorize if form == "low-rank" else dr.deflate
    return trained(change(gpt2(), 2, layers="*wte"))


@pytest.mark.parametrize("form", ["low-rank", "adapted"])
def test_tied_weights_stay_tied(form: str, tmp_path: Path) -> None:
    model = tied(form)
    before = output(model)
    model.tie_weights()
    assert model.lm_head.down is model.transformer.wte.down
    assert torch.equal(output(model), before)
    for copied in (copy.deepcopy(model), dr.inflate(pickle.loads(pickle.dumps(model)))):
        copied.tie_weights()
        torch.testing.assert_close(output(copied), before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.up is loaded.transformer.wte.up and same(loaded, model)
    merged = dr.merge(loaded)
    merged.tie_weights()
    assert merged.lm_head.weight is merged.transformer.wte.weight


@pytest.mark.parametrize("form", ["low-rank", "adapted"])
def test_embeddings_with_factors_cannot_be_resized(form: str) -> None:
    model = tied(form)
    before = output(model)
    with pytest.raises(ValueError, match=r"inflate\(model\) .* first, .*resize emb"):
        model.resize_token_embeddings(70)
    assert torch.equal(output(model), before) and model.config.vocab_size == 64


def test_embeddings_without_factors_are_resized() -> None:
    for model in (dr.factorize(gpt2(), 2), dr.inflate(tied("low-rank"))):
        before = output(model)
        model.resize_token_embeddings(70, mean_resizing=False)
        torch.testing.assert_close(output(model)[..., :64], before)
        dr.factorize(model, 2, layers="*wte")
        assert output(model).shape[-1] == 70
        assert model.lm_head.down is model.transformer.wte.down
        dr.inflate(model)
        assert model.transformer.wte.weight.shape == (70, 16)
