"""The registry of data sets, readers and networks that a recipe can name.

Modules are imported lazily: an image recipe does not import anything for text. The module of a data
set has two functions, called through :mod:`dynarank.train.tasks`:

- ``make_task(recipe, data, *, seed, device, train_limit, test_limit) -> Task``,
- ``sketch(recipe) -> Sketch``, which needs no data.

The module of a network has a dict ``MODELS`` from these names to functions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DATA", "MODELS", "READERS", "TEXT_READER", "build_model"]

_GLUE, _TEXT_MODELS = "dynarank.train.glue", "dynarank.train.text_models"
_IMAGES, _IMAGE_MODELS = "dynarank.train.images", "dynarank.train.models"

DATA: dict[str, str] = {
    "digits": _IMAGES,
    "shifted-digits": _IMAGES,
    "cifar10": _IMAGES,
    "cifar100": _IMAGES,
    "fashion-mnist": _IMAGES,
    "text": "dynarank.train.language_task",
    "imdb": "dynarank.train.imdb",
    "sst2": _GLUE,
    "mrpc": _GLUE,
    "cola": _GLUE,
    "rte": _GLUE,
    "stsb": _GLUE,
}
"""The module of each data set, which makes its task."""

READERS: dict[str, str] = {
    "imagefolder": "dynarank.train.readers.image_folder",
    "csv": "dynarank.train.readers.csv_table",
    "npz": "dynarank.train.readers.npz_arrays",
    "hf": "dynarank.train.readers.hub",
}
"""The module of each reader of a user's own data, named as ``csv:FILE``; its function ``read``."""

TEXT_READER = "text"
"""``text:PLACE`` is the data set ``text``, read from a place of the user's own."""

MODELS: dict[str, str] = {
    "digits-net": _IMAGE_MODELS,
    "mlp": _IMAGE_MODELS,
    "resnet8": _IMAGE_MODELS,
    "resnet20": _IMAGE_MODELS,
    "wrn-16-4": _IMAGE_MODELS,
    "wrn-28-10": _IMAGE_MODELS,
    "bert": _TEXT_MODELS,
    "bilstm": _TEXT_MODELS,
    "gpt": _TEXT_MODELS,
}
"""The module of each network, which builds it."""


def build_model(name: str, **options: Any) -> nn.Module:
    """Build the network of this name.

    Raises:
        ValueError: an option that the network does not have.
    """
    builders = cast("dict[str, Callable[..., nn.Module]]", import_module(MODELS[name]).MODELS)
    try:
        return builders[name](**options)
    except TypeError as error:
        listed = ", ".join(options)
        raise ValueError(f"model {name!r} does not accept {listed}: {error}") from error
