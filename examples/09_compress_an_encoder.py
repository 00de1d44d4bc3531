"""A trained sentence encoder at lower rank: what is left of its quality, and what it costs.

Nothing is trained: each linear layer of the encoder is truncated to a share of its largest rank,
plainly (by an SVD of the weight), calibrated (activation-aware, on unlabeled sentences), and
calibrated with ranks chosen for each layer at the same FLOPs. Quality is the Spearman correlation
of cosine similarities with human scores on the dev set of STS-B, in GLUE's layout. Needs
transformers, scipy, and a folder with an encoder, such as all-MiniLM-L6-v2:

    python examples/09_compress_an_encoder.py --encoder FOLDER --data STS-B --json result.json
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import dynarank as dr
from dynarank.cost.flops import trace

LAYERS = "encoder.*"  # not the embeddings, nor the pooler, which sentence vectors do not use


def read_pairs(path: Path) -> tuple[list[str], list[float]]:
    """The sentences of the pairs, one after the other, and the score of each pair."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sentences = [row[name] for row in rows for name in ("sentence1", "sentence2")]
    return sentences, [float(row["score"]) for row in rows]


def tokenized(tokenizer: Any, sentences: list[str]) -> Iterator[dict[str, Tensor]]:
    """Batches of 32 sentences."""
    for start in range(0, len(sentences), 32):
        texts = sentences[start : start + 32]
        yield dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


@torch.inference_mode()
def spearman(model: nn.Module, batches: list[dict[str, Tensor]], scores: list[float]) -> float:
    """The correlation of the pairs' cosine similarities with their scores."""
    vectors: list[Tensor] = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        states = model(**batch).last_hidden_state * mask
        vectors.append(nn.functional.normalize(states.sum(1) / mask.sum(1)))
    all_vectors = torch.cat(vectors)
    cosines = (all_vectors[::2] * all_vectors[1::2]).sum(1)
    return float(spearmanr(cosines, scores).statistic)


def variants(
    model: nn.Module, calibration: Any, sample: Any, shares: list[float]
) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """The model and its truncations: a name, the model, its plan."""
    yield "full rank", model, {}
    paths = [s.path for s in dr.survey(model) if s.form and s.path.startswith(LAYERS[:-1])]
    for share in shares:
        plan = dict.fromkeys(paths, dr.LowRank(dr.Rank(share, of="min")))
        flops = trace(model, sample).flops(plan).training
        chosen = dr.plan_within(model, sample, flops=flops, layers=LAYERS, calibration=calibration)
        for name, one, known in (
            ("plain", plan, None),
            ("calibrated", plan, calibration),
            ("calibrated, in a budget", chosen, calibration),
        ):
            twin = copy.deepcopy(model)
            dr.apply_plan(twin, one, calibration=known)
            yield f"{share:g} {name}", twin, one


def seconds(models: list[nn.Module], batch: dict[str, Tensor], rounds: int) -> list[float]:
    """The median time of a forward pass of each model, interleaved."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for model, own in zip(models, times, strict=True):
                begun = time.perf_counter()
                model(**batch)
                own.append(time.perf_counter() - begun)
    return [median(own[1:]) for own in times]


def measured(
    model: nn.Module, calibration: Any, sample: Any, shares: list[float], rounds: int,
    score: Callable[[nn.Module], float],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each variant."""
    found = list(variants(model, calibration, sample, shares))
    use = trace(model, sample)
    full = use.flops({}).forward
    times = seconds([one for _, one, _ in found], sample, rounds)
    return [
        {
            "variant": name,
            "spearman": score(one),
            "forward_flops": use.flops(plan).forward / full,
            "megabytes": sum(p.numel() * p.element_size() for p in one.parameters()) / 1e6,
            "milliseconds": 1e3 * took,
        }
        for (name, one, plan), took in zip(found, times, strict=True)
    ]


def main(encoder: Path, data: Path, shares: list[float], rounds: int) -> list[dict[str, Any]]:
    """Measure all variants, and print a table."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    sentences, scores = read_pairs(data / "dev.tsv")
    unlabeled = read_pairs(data / "train.tsv")[0][:512]
    test, sample = list(tokenized(tokenizer, sentences)), next(tokenized(tokenizer, sentences))
    calibration = dr.calibrate(model, tokenized(tokenizer, unlabeled), layers=LAYERS)
    rows = measured(
        model, calibration, sample, shares, rounds, lambda one: spearman(one, test, scores)
    )
    print(f"{'share of the largest rank':30} Spearman  FLOPs      size     time")
    for row in rows:
        print(
            f"{row['variant']:30} {row['spearman']:8.4f} {row['forward_flops']:5.2f}x "
            f"{row['megabytes']:6.1f} MB {row['milliseconds']:5.1f} ms"
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with STS-B's .tsv files")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.375, 0.25])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = vars(parser.parse_args())
    place = arguments.pop("json")
    table = main(**arguments)
    if place is not None:
        versions = {name: version(name) for name in ("dynarank", "torch", "transformers")}
        told = {**versions, "threads": torch.get_num_threads(), "rows": table}
        place.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
