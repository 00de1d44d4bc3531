"""Image classification, the task of the image recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.records import Metric
from dynarank.train.batches import Batches
from dynarank.train.data import (
    ImageData,
    limit,
    limit_test,
    load_cifar10,
    load_cifar100,
    load_digits_data,
    load_fashion_mnist,
    load_shifted_digits,
)
from dynarank.train.networks import build_network, sketch_network
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.registry import MODELS
from dynarank.train.task import Evaluation, Sketch

__all__ = ["IMAGE_SETS", "ImageSet", "ImageTask", "make_task", "sketch"]

_TEST_BATCH = 1000


@dataclass(frozen=True)
class ImageSet:
    """An image data set that recipes can name.

    Args:
        shape: (channels, height, width).
        classes: the number of classes.
        load: a function that reads it from a location; None: the value of DYNARANK_DATA.
    """

    shape: tuple[int, int, int]
    classes: int
    load: Callable[[str | None], ImageData]


IMAGE_SETS = {
    "digits": ImageSet((1, 8, 8), 10, lambda place: load_digits_data()),
    "shifted-digits": ImageSet((1, 12, 12), 10, lambda place: load_shifted_digits()),
    "cifar10": ImageSet((3, 32, 32), 10, load_cifar10),
    "cifar100": ImageSet((3, 32, 32), 100, load_cifar100),
    "fashion-mnist": ImageSet((1, 28, 28), 10, load_fashion_mnist),
}


class ImageTask:
    """Image classification with cross-entropy and accuracy; models and batches are channels-last.

    Args:
        recipe: the recipe, for batch size, shuffling, augmentation, label smoothing and model.
        data: the images, on the training device.
        seed: the seed of order and augmentation.

    Raises:
        RecipeError: the training images do not fill one batch.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
        >>> data = ImageData(images, labels, images, labels, 10)
        >>> task = ImageTask(load_recipe("digits"), data, seed=0)
        >>> task.metric.name, task.steps_per_epoch
        ('accuracy', 1)
    """

    metric = Metric(name="accuracy", higher_is_better=True, percent=True)

    def __init__(self, recipe: Recipe, data: ImageData, *, seed: int) -> None:
        self.recipe, self.data = recipe, data
        self.train_size = len(data.train_labels)
        if self.train_size < recipe.batch_size:
            raise RecipeError(
                f"{self.train_size} training images do not fill one batch of "
                f"{recipe.batch_size}; raise --train-limit"
            )
        self.batches = Batches(
            data.train_images,
            data.train_labels,
            recipe.batch_size,
            seed=seed,
            shuffle=recipe.shuffle,
            augment=recipe.augment,
            memory_format=torch.channels_last,
        )
        self.steps_per_epoch = len(self.batches)

    def model(self) -> nn.Module:
        """A new network, channels-last, on the device of the images."""
        images, recipe = self.data.train_images, self.recipe
        offered = _offered(recipe, images.shape[1:])
        model = build_network(recipe, {"classes": self.data.classes}, **offered).to(images.device)
        return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def sample(self) -> Tensor:
        """A batch of images ``(B, C, H, W)``."""
        return self.data.train_images[: self.recipe.batch_size]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images ``(B, C, H, W)`` and labels ``(B,)``."""
        return self.batches.epoch(epoch, start=start)

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The images."""
        return batch[0]

    def tensors(self) -> Iterator[Tensor]:
        """The images and labels."""
        return (value for value in vars(self.data).values() if isinstance(value, Tensor))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy with the recipe's label smoothing, and the accuracy of the batch."""
        images, labels = batch
        output = model(images)
        loss = F.cross_entropy(output, labels, label_smoothing=self.recipe.label_smoothing)
        return loss, (output.detach().argmax(1) == labels).float().mean()

    def loss_terms(self, batch: tuple[Tensor, Tensor]) -> tuple[int]:
        """The number of images."""
        return (len(batch[1]),)

    def evaluate(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Evaluation:
        """The cross-entropy (without label smoothing) and accuracy on the test set."""
        images, labels = self.data.test_images, self.data.test_labels
        loss = torch.zeros((), device=images.device)
        correct = torch.zeros((), device=images.device, dtype=torch.long)
        for x, y in zip(images.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True):
            with autocast():
                output = model(x.contiguous(memory_format=torch.channels_last)).float()
            loss += F.cross_entropy(output, y, reduction="sum")
            correct += (output.argmax(1) == y).sum()
        accuracy = correct.item() / len(labels)
        return Evaluation(loss.item() / len(labels), {self.metric.name: accuracy})


def make_task(
    recipe: Recipe,
    data: str | None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None,
    test_limit: int | None,
) -> ImageTask:
    """Read the images and make the task; see :func:`dynarank.train.tasks.make_task`."""
    images = IMAGE_SETS[recipe.data].load(data)
    images = images if train_limit is None else limit(images, train_limit)
    images = images if test_limit is None else limit_test(images, test_limit)
    moved = {name: x.to(device) for name, x in vars(images).items() if isinstance(x, Tensor)}
    return ImageTask(recipe, replace(images, **moved), seed=seed)


def sketch(recipe: Recipe) -> Sketch:
    """The network and one batch of images on the meta device."""
    kind = IMAGE_SETS[recipe.data]
    offered = _offered(recipe, kind.shape)
    model = sketch_network(recipe, {"classes": kind.classes}, **offered)
    return Sketch(model, torch.empty(recipe.batch_size, *kind.shape, device="meta"))


def _offered(recipe: Recipe, shape: Sequence[int]) -> dict[str, int]:
    """What a network of the user's own may want to know of the images."""
    if recipe.model in MODELS:
        return {}
    return {"channels": shape[0], "inputs": math.prod(shape)}
