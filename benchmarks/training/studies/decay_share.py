"""The momentum after inflating an adapter under SGD, with and without separating weight decay.

    python benchmarks/training/studies/decay_share.py

The true momentum is computed from the merged model's gradients on the same batches (kept for 60
steps alongside the run). See Note [Weight decay] in ``dynarank.surgery.moments``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dynarank as dr
from dynarank.decompositions import precise
from dynarank.surgery.moments import Averaging
from dynarank.surgery.selection import find_sites
from dynarank.surgery.side import Side
from dynarank.surgery.sites import Site, survey
from dynarank.train.data import load_digits_data
from dynarank.train.models import DigitsNet

DECAY, MOMENTUM = 5e-4, 0.9
PATHS = ("conv1", "conv2", "conv3")
RESULTS = Path(__file__).with_name("moments") / "decay_share.jsonl"


def measure(steps: int, seed: int) -> list[dict[str, Any]]:
    """``steps`` adapted steps after 100 full-rank ones, then a row for each layer."""
    data = load_digits_data()
    torch.manual_seed(seed)
    model, generator = DigitsNet(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, MOMENTUM, weight_decay=DECAY)
    true = {path: torch.zeros(()) for path in PATHS}
    for step in range(100 + steps):
        if step == 100:
            plan = dict.fromkeys(PATHS, dr.Adapted(dr.Rank(0.5, of="out")))
            dr.apply_plan(model, plan, optimizer=optimizer, moments="reset")
        rows = torch.randint(0, len(data.train_labels), (64,), generator=generator)
        x, y = data.train_images[rows], data.train_labels[rows]
        whole = dr.merge(copy.deepcopy(model)) if step >= 100 + steps - 60 else None
        if whole is not None and step >= 100:
            F.cross_entropy(whole(x), y).backward()
            for path in PATHS:
                weight = whole.get_submodule(path).weight
                true[path] = MOMENTUM * true[path] + weight.grad + DECAY * weight.detach()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    sites = find_sites(model, survey(model), PATHS).values()
    old = {site.path: _lifted(site, optimizer) for site in sites}
    dr.inflate(model, optimizer=optimizer)
    rows_ = []
    for path, lifted in old.items():
        now = optimizer.state[model.get_submodule(path).weight]["momentum_buffer"]
        aim = true[path]
        cosine = F.cosine_similarity(now.flatten(), aim.flatten(), dim=0).item()
        norms = {"true": aim.norm().item(), "lifted": lifted, "carried": now.norm().item()}
        rows_.append({"steps": steps, "seed": seed, "layer": path} | norms | {"cosine": cosine})
    return rows_


def _lifted(site: Site, optimizer: torch.optim.Optimizer) -> float:
    """The norm of the momentum lifted as if all of it were a gradient."""
    assert Averaging.of(optimizer.param_groups[0]).decay == DECAY
    parameters = {name: precise(p) for name, p in site.parameters().items()}
    buffers = tuple(precise(optimizer.state[p]["momentum_buffer"]) for p in site.factors())
    return Side.of(site.spec, site.form, parameters).lift(buffers).norm().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with RESULTS.open("a", encoding="utf-8") as file:
        for count in (5, 100):
            for row in measure(count, 0):
                print(row)
                file.write(json.dumps(row) + "\n")
