"""A table: the 64 columns of scikit-learn's digits.

Of scikit-learn's own tables (breast_cancer, wine, digits, diabetes) it is the one on which rank
matters and that has enough rows to tell: wine has 178, and on the other two factors of rank 2 did
no worse than full rank at a quick look.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.training.problems.networks import MLP
from benchmarks.training.problems.rows import Rows, fixed_order


class Table(Rows):
    """64-64-64-64-10 on 900 rows; 297 validate and 600 test, always the same."""

    layers, batch_size, rate = "body.*", 64, 0.003

    def __init__(self, width: int = 64, epochs: int = 60) -> None:
        self.width = width
        super().__init__(digits(900, 297), epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """64-w-w-w-10."""
        return MLP(64, round(self.width * width), 10)


def digits(train: int, valid: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows, normalized by the mean and deviation of the training rows, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = fixed_order(len(found.target))
    x, y = torch.from_numpy(found.data[order]).float(), torch.from_numpy(found.target[order])
    x = (x - x[:train].mean(0)) / (x[:train].std(0) + 0.1)  # some columns are constant
    rows = (train, valid, len(y) - train - valid)
    parts = zip(x.split(rows), y.long().split(rows), strict=True)
    return dict(zip(("train", "valid", "test"), parts, strict=True))
