"""Train at low rank and ship the result as plain modules, .pt2 and ONNX, without dynarank.

``dr.merge`` would give full-size layers back; ``dr.to_plain`` keeps the factors as two layers in a
row. Needs scikit-learn and ``pip install 'dynarank[onnx]'``; runs in half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynarank as dr
from dynarank.export.onnx import to_onnx
from dynarank.export.program import to_pt2


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Plain steps on random batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(model: nn.Module) -> int:
    """Their number."""
    return sum(p.numel() for p in model.parameters())


def main(steps: int) -> None:
    """Train, export in three ways, and compare outputs and sizes."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    x = (x - x.mean()) / x.std()
    torch.manual_seed(0)
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    model = dr.factorize(nn.Sequential(*layers), rank=32)
    train(model, x[:1500], y[:1500], steps)

    plain, merged = dr.to_plain(model).eval(), dr.merge(copy.deepcopy(model))
    test = x[1500:]
    with torch.no_grad():
        expected = model.eval()(test)
        print(f"test accuracy {(expected.argmax(1) == y[1500:]).float().mean():.3f}")
        print("the same outputs:", torch.allclose(plain(test), expected, atol=1e-4))
    print(plain[2])
    print("parameters: " + ", ".join(
        f"{name} {parameters(one):,}"
        for name, one in (("trained", model), ("plain", plain), ("merged", merged))
    ))  # fmt: skip

    folder = Path(tempfile.mkdtemp())
    for write, name in ((to_pt2, "model.pt2"), (to_onnx, "model.onnx")):
        for kind, keep in (("plain", "cheaper"), ("merged", "merged")):
            made = write(model, test[:2], folder / f"{kind}-{name}", keep=keep)
            print(f"{made.path.name}: {made.size:,} bytes, off by {made.difference:.0e}")

    program = torch.export.load(folder / "plain-model.pt2").module()  # needs torch alone
    print("of any batch size:", tuple(program(test).shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    main(parser.parse_args().steps)
