"""Which data sets and networks recipes can name, and where each is made.

Modules are imported when they are asked for: a recipe of images needs nothing of text. A data set
is a row of ``DATA``: the module has two functions,

- ``make_task(recipe, data, *, seed, device, train_limit, test_limit) -> Task``,
- ``sketch(recipe) -> Sketch``, which needs no data.

A network is a row of ``MODELS``: the module has a dict ``MODELS`` of functions by these names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from dynarank.train.task import Task

if TYPE_CHECKING:
    from dynarank.train.recipes import Recipe

__all__ = ["DATA", "MODELS", "Sketch", "build_model", "make_task", "sketch"]

_GLUE, _TEXT_MODELS = "dynarank.train.glue", "dynarank.train.text_models"
_IMAGES, _IMAGE_MODELS = "dynarank.train.images", "dynarank.train.models"

DATA: dict[str, str] = {
    "digits": _IMAGES,
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
"""The module that makes the task, by the name of the data set."""

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
"""The module that builds the network, by its name."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """A recipe's network and one batch of its training, on the meta device: shapes alone.

    Args:
        model: the network.
        sample: a batch's arguments of the forward pass, as ``dynarank.cost.trace`` takes them.
    """

    model: nn.Module
    sample: Any


class _TaskModule(Protocol):
    def make_task(
        self,
        recipe: Recipe,
        data: str | None,
        *,
        seed: int,
        device: torch.device,
        train_limit: int | None,
        test_limit: int | None,
    ) -> Task: ...

    def sketch(self, recipe: Recipe) -> Sketch: ...


def make_task(
    recipe: Recipe,
    data: str | None = None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Task:
    """Read a recipe's data and make its task.

    Args:
        recipe: what to train.
        data: where its data is: a folder, a file, ``hub``; None: what DYNARANK_DATA says.
        seed: of order and augmentation.
        device: where batches are and the model trains.
        train_limit: train on so many examples only; None: all.
        test_limit: test on so many only; None: all.

    Raises:
        ValueError: the data is not there, or is fewer than asked for.
        ImportError: it needs a package that is not installed.
    """
    return _task_module(recipe).make_task(
        recipe, data, seed=seed, device=device, train_limit=train_limit, test_limit=test_limit
    )


def sketch(recipe: Recipe) -> Sketch:
    """A recipe's network and batch without memory and without data.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> sketch(load_recipe("digits")).sample.shape
        torch.Size([64, 1, 8, 8])
    """
    return _task_module(recipe).sketch(recipe)


def build_model(name: str, **options: Any) -> nn.Module:
    """The network of this name, with its options.

    Raises:
        ValueError: an option that it does not have.
    """
    builders = cast("dict[str, Callable[..., nn.Module]]", import_module(MODELS[name]).MODELS)
    try:
        return builders[name](**options)
    except TypeError as error:
        listed = ", ".join(options)
        raise ValueError(f"model {name!r} was asked for with {listed}: {error}") from error


def _task_module(recipe: Recipe) -> _TaskModule:
    return cast(_TaskModule, import_module(DATA[recipe.data]))
