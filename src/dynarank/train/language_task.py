"""Language modeling on bytes, the task of ``text-gpt``.

Legend: T is the context in bytes; a window is T + 1 bytes, T inputs and their T next bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.records import Metric
from dynarank.train.draws import epoch_generator
from dynarank.train.metrics import bits_per_byte, perplexity
from dynarank.train.networks import build_network
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.task import Evaluation, Sketch
from dynarank.train.text_files import TextData, load_split_text, load_text

__all__ = ["LanguageModelTask", "TextOptions", "make_task", "sketch"]

_VOCABULARY = 256
_ORDER, _PHASE = 0, 1  # independent random streams
_TEST_BATCH = 128


@dataclass(frozen=True)
class TextOptions:
    """The data options of a text recipe.

    Args:
        context: T, the number of input bytes per window.
        max_bytes: the maximum size of the corpus.
        held_out: the share of the corpus that is held out for testing.

    Raises:
        ValueError: if the context is below 1.
    """

    context: int = 128
    max_bytes: int = 8_000_000
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"a context must be 1 byte or more, got {self.context}")


class LanguageModelTask:
    """Language modeling on windows of bytes, with cross-entropy and bits per byte.

    Each epoch cuts the training bytes into windows, starting at a random one of the first T bytes,
    and yields them in random order. The test windows do not overlap.

    Args:
        recipe: the recipe, for batch size, label smoothing and model.
        data: the bytes, on the training device.
        context: T, the number of input bytes per window.
        seed: the seed of window offsets and order.
        train_limit: the number of training windows per epoch, evenly spaced; None: all.
        test_limit: the number of test windows, evenly spaced; None: all.

    Raises:
        RecipeError: the training bytes do not fill one batch.
        ValueError: a limit is below 1 or above the number of windows.
    """

    metric = Metric(name="bits per byte", higher_is_better=False, percent=False)

    def __init__(
        self,
        recipe: Recipe,
        data: TextData,
        *,
        context: int,
        seed: int,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        self.recipe, self.data, self.context, self.seed = recipe, data, context, seed
        windows = max(0, len(data.train) // context - 1)  # starting at any of the first T bytes
        self.windows = _spread(windows, train_limit, "training")
        self.steps_per_epoch = len(self.windows) // recipe.batch_size
        if not self.steps_per_epoch:
            raise RecipeError(
                f"{len(self.windows)} training windows of {context} bytes do not fill one batch of "
                f"{recipe.batch_size}; raise --train-limit, or pass more text"
            )
        self.train_size = len(self.windows) * context
        self.test_starts = self._test_starts(test_limit)

    @property
    def facts(self) -> dict[str, Any]:
        """The identity of the text: source, files, bytes and digest."""
        return {
            "source": self.data.source,
            "files": self.data.files,
            "train_bytes": len(self.data.train),
            "test_bytes": len(self.data.test),
            "sha256": self.data.sha256,
        }

    def model(self) -> nn.Module:
        """A new network on the device of the bytes."""
        return _build(self.recipe, self.context).to(self.data.train.device)

    def sample(self) -> Tensor:
        """A batch of bytes ``(B, T)``, int64."""
        return self._windows(self.data.train, self._starts(0)[: self.recipe.batch_size])[:, :-1]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Yield batches of windows ``(B, T + 1)``, int64."""
        starts, size = self._starts(epoch), self.recipe.batch_size
        for step in range(start, self.steps_per_epoch):
            yield self._windows(self.data.train, starts[step * size : (step + 1) * size])

    def inputs(self, batch: Tensor) -> Tensor:
        """The bytes ``(B, T)`` before those to predict."""
        return batch[:, :-1]

    def tensors(self) -> Iterator[Tensor]:
        """The bytes, and the windows of them."""
        yield from (self.data.train, self.windows, self.data.test, self.test_starts)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy in nats per byte, with the recipe's label smoothing; bits per byte."""
        output = model(self.inputs(batch))
        loss = _cross_entropy(output, batch, label_smoothing=self.recipe.label_smoothing)
        return loss, loss.detach() / math.log(2)

    def loss_terms(self, batch: Tensor) -> tuple[int]:
        """The number of windows, which all have T bytes to predict."""
        return (len(batch),)

    def evaluate(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Evaluation:
        """The cross-entropy, bits per byte and perplexity per byte on the test windows."""
        total = torch.zeros((), device=self.data.test.device)
        for starts in self.test_starts.split(_TEST_BATCH):
            batch = self._windows(self.data.test, starts)
            with autocast():
                output = model(batch[:, :-1]).float()
            total += _cross_entropy(output, batch) * len(starts)
        loss = total.item() / len(self.test_starts)
        return Evaluation(
            loss, {self.metric.name: bits_per_byte(loss), "perplexity": perplexity(loss)}
        )

    def _starts(self, epoch: int) -> Tensor:
        """The start positions of an epoch's windows, drawn on the CPU."""
        phases = epoch_generator(self.seed, _PHASE, epoch)
        phase = torch.randint(self.context, (), generator=phases)
        orders = epoch_generator(self.seed, _ORDER, epoch)
        order = torch.randperm(len(self.windows), generator=orders)
        return (phase + self.context * self.windows[order]).to(self.data.train.device)

    def _test_starts(self, limit: int | None) -> Tensor:
        windows = max(0, (len(self.data.test) - 1) // self.context)
        if not windows:
            raise RecipeError(
                f"the test part has {len(self.data.test)} bytes, less than one window of "
                f"{self.context} + 1; pass more text"
            )
        starts = self.context * _spread(windows, limit, "test")
        return starts.to(self.data.test.device)

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        places = torch.arange(self.context + 1, device=starts.device)
        return text[starts[:, None] + places].long()


def make_task(
    recipe: Recipe,
    data: str | None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None,
    test_limit: int | None,
) -> LanguageModelTask:
    """Read the text and make the task; see :func:`dynarank.train.tasks.make_task`.

    DYNARANK_DATA is ignored: it refers to data sets, not to text. By default the text is the source
    code of the standard library.
    """
    options = _options(recipe)
    text = _load(recipe, data, options)
    moved = TextData(text.train.to(device), text.test.to(device), text.files, text.source)
    return LanguageModelTask(
        recipe,
        moved,
        context=options.context,
        seed=seed,
        train_limit=train_limit,
        test_limit=test_limit,
    )


def _load(recipe: Recipe, data: str | None, options: TextOptions) -> TextData:
    """The text of a recipe's own place, or of ``--data``."""
    size, held_out = options.max_bytes, options.held_out
    if not (own := recipe.data.partition(":")[2]):
        return load_text(data, max_bytes=size, held_out=held_out)
    if data is not None:
        raise RecipeError(f"this recipe's text is {own}, got --data {data}; leave --data out")
    place = recipe.root / Path(own).expanduser()
    return load_split_text(place, max_bytes=size, held_out=held_out)


def sketch(recipe: Recipe) -> Sketch:
    """The network and one batch of bytes on the meta device."""
    context = _options(recipe).context
    with torch.device("meta"):
        shape = (recipe.batch_size, context)
        return Sketch(_build(recipe, context), torch.zeros(shape, dtype=torch.long))


def _options(recipe: Recipe) -> TextOptions:
    try:
        return TextOptions(**recipe.data_options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {recipe.name!r}, data_options: {error}") from error


def _build(recipe: Recipe, context: int) -> nn.Module:
    return build_network(recipe, {"vocabulary": _VOCABULARY, "context": context})


def _cross_entropy(output: Tensor, batch: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    following = batch[:, 1:].flatten()
    return F.cross_entropy(output.flatten(0, 1), following, label_smoothing=label_smoothing)


def _spread(there: int, asked: int | None, which: str) -> Tensor:
    """The indices of ``asked`` evenly spaced windows out of all."""
    if asked is None:
        return torch.arange(there)
    if not 1 <= asked <= there:
        raise ValueError(
            f"{asked} {which} windows requested, but there are {there}; request 1 to {there}"
        )
    return torch.arange(asked) * there // asked
