"""Plain against activation-aware truncation of networks without BatchNorm: the loss right after.

Two small networks on the digits, trained for 12 epochs at full rank; their inner layers are then
truncated to a rank at once. An MLP of 64-64-64-10 and a convolutional network of 8, 16 and 32
channels, with biases and ReLU. Calibrated on 512 training images, without training afterwards.

python benchmarks/training/studies/low_rank_ending_without_norm.py --seeds 0 1 2 --out FILE
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynarank as dr
from dynarank.recording.host import commit, hardware
from dynarank.train.data import ImageData, load_digits_data

RANKS = {"mlp": (6, 8, 12, 16, 24), "conv": (2, 4, 6, 8, 12)}
LAYERS = {"mlp": ("1", "3"), "conv": ("2", "4")}


def network(kind: str) -> nn.Sequential:
    """The network, freshly initialized."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
                             nn.ReLU(), nn.Linear(64, 10))  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, data: ImageData) -> None:
    """Twelve epochs of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(len(data.train_labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_images[rows]), data.train_labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy on the test set."""
    output = model(images)
    accuracy = (output.argmax(1) == labels).float().mean().item()
    return {"loss": F.cross_entropy(output, labels).item(), "accuracy": accuracy}


def runs_of(kind: str, seed: int, data: ImageData) -> list[dict[str, Any]]:
    """Every arm of one trained network."""
    torch.manual_seed(seed)
    model = network(kind)
    train(model, data)
    where = {"network": kind, "seed": seed}
    tested = (data.test_images, data.test_labels)
    found: list[dict[str, Any]] = [{**where, "arm": "full-rank", **test(model, *tested)}]
    calibration = dr.calibrate(model, data.train_images[:512].split(128))
    for rank in RANKS[kind]:
        for arm, known in (("plain", None), ("calibrated", calibration)):
            cut = dr.deflate(
                copy.deepcopy(model), dict.fromkeys(LAYERS[kind], rank), to="low-rank",
                calibration=known,
            )  # fmt: skip
            found.append({**where, "arm": arm, "rank": rank, **test(cut, *tested)})
    return found


def main() -> None:
    """Run every network and seed and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits_data()
    header = {
        "hardware": hardware(torch.device("cpu")), "commit": commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    runs = [one for kind in RANKS for seed in given.seeds for one in runs_of(kind, seed, data)]
    given.out.write_text(json.dumps({**header, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
