"""A data set of the Hugging Face hub, or a local one, through ``datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynarank.sinks.extras import import_extra
from dynarank.train.readers.splits import check_share, split
from dynarank.train.sources import DataError

__all__ = ["read"]

_TESTS = ("test", "validation", "valid", "dev")
_TARGETS = ("label", "labels", "target", "fine_label", "score")
_INPUTS = ("image", "img", "pixel_values", "features", "x", "input")


def read(
    place: str,
    folder: Path,
    *,
    config: str | None = None,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    test: str | None = None,
    test_share: float = 0.2,
) -> Any:
    """Load a data set; images become float ``(C, H, W)`` from 0 to 1, numbers tensors.

    Args:
        place: the hub's name, or a folder, relative to ``folder``.
        folder: the recipe's folder.
        config: the configuration of a data set that has several.
        inputs: the input column; of several, batches are dicts with the target as ``labels``.
        target: the target column; None: ``label`` or the like.
        test: the split to test on; None: ``test`` or ``validation``, or a fixed part of ``train``.
        test_share: the share of that part.

    Raises:
        DataError: it cannot be loaded, or has no such split or column.
        ImportError: the ``data`` extra is not installed.
    """
    splits, who = _load(place, folder, config), f"hf:{place}"
    if "train" not in splits:
        raise DataError(f"{who} has no split train; it has {', '.join(map(str, splits))}")
    name = test or next((one for one in _TESTS if one in splits), None)
    if test is not None and test not in splits:
        raise DataError(f"{who} has no split {test!r}; it has {', '.join(map(str, splits))}")
    columns = list(splits["train"].column_names)
    target = target or next((one for one in _TARGETS if one in columns), None)
    chosen = [inputs] if isinstance(inputs, str) else list(inputs or ())
    chosen = chosen or [one for one in _INPUTS if one in columns][:1]
    if target is None or not chosen or not {*chosen, target} <= set(columns):
        raise DataError(
            f"{who} has the columns {', '.join(columns)}: set inputs and target in data_options, "
            f"got {chosen} and {target}"
        )
    if name is not None:
        return tuple(_Rows(splits[one], who, chosen, target) for one in ("train", name))
    whole = splits["train"]
    labels = torch.as_tensor(np.asarray(whole[target]))
    kept = split(labels, check_share("test_share", test_share))
    return tuple(_Rows(whole.select(one.tolist()), who, chosen, target) for one in kept)


def _load(place: str, folder: Path, config: str | None) -> Any:
    datasets = import_extra("datasets", "data", f"hf:{place}")
    local = folder / Path(place).expanduser()
    try:
        if (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(local))
        name = str(local) if local.exists() else place
        return datasets.load_dataset(name, *([config] if config else []))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"hf:{place} could not be loaded: {error!r}") from error


class _Rows(Dataset[Any]):
    """The rows of a split as ``(x, y)``, or as dicts if there are several inputs."""

    def __init__(self, rows: Any, who: str, inputs: Sequence[str], target: str) -> None:
        self.rows, self.who, self.inputs, self.target = rows, who, inputs, target
        names = getattr(getattr(rows, "features", {}).get(target), "names", None)
        if names is not None:
            self.classes = list(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        found = {name: self._tensor(row[name], name, index) for name in self.inputs}
        label = self._tensor(row[self.target], self.target, index)
        return (*found.values(), label) if len(found) == 1 else {**found, "labels": label}

    def _tensor(self, value: Any, name: str, index: int) -> Tensor:
        if hasattr(value, "convert"):  # an image of Pillow
            value = value if value.mode in ("L", "RGB") else value.convert("RGB")
            pixels = torch.from_numpy(np.array(value, np.uint8)).float() / 255
            return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        try:
            found = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.who}, row {index}, column {name!r} is {type(value).__name__}, no number; "
                "text is tokenized in a data function of your own (data = 'file.py:function')"
            ) from error
        return found.float() if found.dtype == torch.float64 else found
