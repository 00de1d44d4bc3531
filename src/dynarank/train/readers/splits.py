"""Places of data, and the split of data that comes in one part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dynarank.train.draws import epoch_generator
from dynarank.train.sources import DataError

__all__ = ["check_share", "find", "split"]


def find(place: str, folder: Path) -> Path:
    """The path of data, relative to a recipe's folder.

    Raises:
        DataError: nothing is there.
    """
    path = folder / Path(place).expanduser()
    if not place or not path.exists():
        raise DataError(f"{path} does not exist; places are relative to the recipe's folder")
    return path


def check_share(name: str, share: float) -> float:
    """Raise DataError if a share is not between 0 and 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"{name} must be between 0 and 1, got {share!r}")
    return share


def split(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The indices of training and test examples: a fixed choice, the same share of every class.

    Args:
        labels: classes ``(N,)``; of real numbers, all are one class.
        share: the share of the test examples.

    Raises:
        DataError: there are too few examples for both.

    Example:
        >>> train, test = split(torch.tensor([0] * 8 + [1] * 4), 0.25)
        >>> len(train), len(test)
        (9, 3)
    """
    order = torch.randperm(len(labels), generator=epoch_generator(0, 0, 0))
    kinds = torch.zeros(len(labels)) if labels.is_floating_point() else labels
    held: list[Tensor] = []
    for kind in kinds.unique():
        own = order[kinds[order] == kind]
        held.append(own[: round(share * len(own))])
    test = torch.cat(held).sort().values
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    if not len(test) or not train.any():
        raise DataError(
            f"{len(labels)} examples cannot be split: a share of {share} for testing leaves "
            f"{int(train.sum())} for training and {len(test)} for testing"
        )
    return train.nonzero().squeeze(1), test
