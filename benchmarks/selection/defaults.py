"""What the default choice of layers costs at rank 0.5, on networks people train.

    python benchmarks/selection/defaults.py --out benchmarks/selection/results/2026-11-28

Models are built from their configurations on the meta device; the weights are those that
``factorize(model, 0.5)`` takes with no other argument, counted by ``dynarank.cost``: FLOPs of
matrix products and convolutions in a training step (1 multiply-add = 2), whatever the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

import dynarank as dr
from dynarank.cost.flops import ModelUse, trace
from dynarank.forms import LowRank, Plan
from dynarank.surgery.selection import select
from dynarank.train.wide_resnet import WideResNet

BAR = 0.62
IMAGES = (8, 3, 224, 224)
WORDS = {"input_ids": (8, 256)}
PAIRS = {"input_ids": (8, 256), "decoder_input_ids": (8, 256)}
RESNET_18 = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}

# Sizes are the defaults of the configurations, except where given: those of the published models.
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Llama (7B)": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig()), WORDS),
    "BERT (base, classifier)": (lambda: hf.BertForSequenceClassification(hf.BertConfig()), WORDS),
    "GPT-2 (small)": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), WORDS),
    "ViT (B/16)": (lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)), IMAGES),
    "T5 (small)": (lambda: hf.T5ForConditionalGeneration(hf.T5Config()), PAIRS),
    "ConvNeXt (tiny)": (
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(num_labels=1000)),
        IMAGES,
    ),
    "ResNet-18": (
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET_18, num_labels=1000)),
        IMAGES,
    ),
    "WRN-28-10": (lambda: WideResNet(28, 10, 100), (8, 3, 32, 32)),
}


@dataclass(frozen=True)
class Row:
    """A model at rank 0.5; shares are of full rank."""

    model: str
    chosen: int
    weights: int
    flops_of_chosen: float
    flops: float
    parameters: float
    left: dict[str, str]


def measure(name: str, rank: float = 0.5) -> Row:
    """The cost of one model under the default choice."""
    make, shape = MODELS[name]
    with torch.device("meta"):
        model = make()
    use = trace(model, sample(shape))
    sites = dr.survey(model)
    plan = {site.path: LowRank(rank) for site in select(sites, None, rank)}
    left = {site.path: site.obstacle or site.left_out or "no cheaper" for site in sites}
    full, low = use.parameters({})[1], use.parameters(plan)[1]
    return Row(
        name, len(plan), len(sites), _of_chosen(use, plan),
        use.flops(plan).training / use.flops({}).training, low / full,
        {path: why for path, why in left.items() if path not in plan},
    )  # fmt: skip


def sample(shape: Any) -> Any:
    """A batch on the meta device: images, or words by keyword."""
    if isinstance(shape, tuple):
        return torch.empty(shape, device="meta")
    return {key: torch.empty(s, dtype=torch.long, device="meta") for key, s in shape.items()}


def _of_chosen(use: ModelUse, plan: Plan) -> float:
    low = sum(use.layers[path].flops(form).training for path, form in plan.items())
    return low / sum(use.layers[path].flops(dr.FullRank()).training for path in plan)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with the reasons why weights are left."""
    lines = [
        "| model | weights chosen | FLOPs of these | FLOPs of the model | parameters | left |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        reasons = [why.split(":")[0] for why in row.left.values()]
        left = ", ".join(f"{reasons.count(why)} {why}" for why in dict.fromkeys(reasons))
        lines.append(
            f"| {row.model} | {row.chosen} of {row.weights} | {row.flops_of_chosen:.3f}x "
            f"| {row.flops:.3f}x | {row.parameters:.3f}x | {left} |"
        )
    return "\n".join(lines)


def main(out: Path | None) -> None:
    """Print the table, and write it and its rows."""
    rows = [measure(name) for name in MODELS]
    text = table(rows)
    print(text)
    assert all(row.flops_of_chosen <= BAR for row in rows), f"a model is above {BAR}"
    if out is not None:
        versions = {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": hf.__version__,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        data = {"versions": versions, "rank": 0.5, "rows": [asdict(row) for row in rows]}
        (out / "defaults.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / "defaults.md").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    main(parser.parse_args().out)
