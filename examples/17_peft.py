"""A model goes to PEFT and comes back: full rank, adapters, a PEFT folder, and on from there.

A network trains at full rank, then an adapter on the frozen result. PEFT loads the folder that
``dr.to_peft`` writes and computes the same. What PEFT trained comes back by ``dr.from_peft``, as
layers that a rank scheduler changes: inflated, trained on, merged. Needs scikit-learn and PEFT
(``pip install 'dynarank[demo,peft]'``); runs in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynarank as dr


def digits() -> tuple[Tensor, Tensor]:
    """Images, (n, 1, 8, 8), and classes."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8)
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


def network() -> Any:
    """Two convolutions and two linear layers."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)]
    head = [nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*convolutions, *head)


def train(model: nn.Module, steps: int, schedule: Any = None) -> float:
    """Steps of AdamW on random batches, with a rank schedule if there is one; the last loss."""
    (x, y), loss = digits(), torch.zeros(())
    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    ranks = schedule and dr.RankScheduler(model, optimizer, schedule, steps, layers=["2", "5"])
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ranks:
            ranks.step()
    return loss.item()


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module) -> float:
    """Of the outputs for all images, relative to the largest."""
    x, _ = digits()
    expected = one.eval()(x)
    return ((other.eval()(x) - expected).abs().max() / expected.abs().max()).item()


def main(steps: int) -> None:
    """Train, export, load with PEFT, train there, bring back and go on."""
    model = network()
    print(f"full rank: loss {train(model, steps):.4f}")
    dr.deflate(model, rank=4, layers=["2", "5"])
    print(f"adapters of rank 4: loss {train(model, steps):.4f}")

    folder = Path(tempfile.mkdtemp()) / "adapter"
    base = dr.to_peft(model, folder)
    print("written:", *sorted(path.name for path in folder.iterdir()))
    back = dr.from_peft(copy.deepcopy(base), folder)
    print("there and back, bit by bit the same factors:", torch.equal(back[2].up, model[2].up))
    loaded: Any = PeftModel.from_pretrained(base, folder, is_trainable=True)  # type: ignore[arg-type]
    print("PEFT computes the same:", difference(model, loaded) < 1e-6)

    print(f"trained by PEFT: loss {train(loaded, steps):.4f}")
    model = dr.from_peft(loaded)
    print("brought back, it computes the same:", difference(loaded, model) < 1e-6)
    schedule = dr.schedules.Phases([0.0, 0.5], [model[2].form, dr.FullRank()])
    print(f"adapters, then full rank: loss {train(model, steps, schedule):.4f}")
    print(type(dr.merge(model)[2]).__name__, "again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each part")
    main(parser.parse_args().steps)
