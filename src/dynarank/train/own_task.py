"""The task of a recipe with data of the user's own, from a data function or a reader.

Batches are what PyTorch users have: ``(x, y)``, a tuple whose last entry is the target, or a dict.
Of a dict with a key that says it is the target (``labels`` or the like), the rest are the arguments
of the forward pass; if no loss is named and the model takes that key too, the loss is the model's
own, ``model(**batch).loss``. A batch that is one tensor is its own target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from dynarank.layers.running import call_model, preserve_state
from dynarank.records import Metric
from dynarank.train.losses import LOSSES, class_scores, cross_entropy, default_loss
from dynarank.train.networks import build_network, sketch_network
from dynarank.train.own_code import accepted, calling, check_options, is_reference, told
from dynarank.train.own_draws import kept_generators, seed_generators
from dynarank.train.own_facts import TARGETS, data_facts, split_batch, targets_in_memory
from dynarank.train.own_metrics import METRICS, Score, default_metric
from dynarank.train.own_parts import Part, StreamPart, TensorPart, make_parts, plain
from dynarank.train.recipe import Recipe, reader_of
from dynarank.train.recipe_error import RecipeError
from dynarank.train.registry import READERS
from dynarank.train.task import Evaluation, Sketch

__all__ = ["OwnTask", "make_task", "sketch"]

_DATA_SEED = 0
_LONGEST_TEST = 1000  # batches of a test stream; more if an epoch is long


class OwnTask:
    """Own data with a loss and a metric, named or own.

    Args:
        recipe: the recipe.
        train: the training examples.
        test: the test examples.
        seed: the seed of order and transforms.
        device: the device of model and batches.
        facts: what is recorded of the data.

    Raises:
        RecipeError: the training examples do not fill one batch, or the first batch cannot be read.

    Example:
        >>> x, y = torch.randn(8, 4), torch.arange(8) % 2
        >>> recipe = Recipe(data="a.py:data", model="mlp", epochs=1, learning_rate=0.1)
        >>> part = TensorPart((x, y), 4)
        >>> task = OwnTask(recipe, part, part, seed=0, device=torch.device("cpu"))
        >>> task.metric.name, task.steps_per_epoch, task.model().head
        ('accuracy', 2, Linear(in_features=1024, out_features=2, bias=True))
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Part,
        test: Part,
        *,
        seed: int,
        device: torch.device,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.train, self.test = recipe, train, test
        self.seed, self.device = seed, device
        self.steps_per_epoch = train.steps
        if not self.steps_per_epoch:
            raise RecipeError(
                f"{train.size} training examples do not fill one batch of {train.batch_size}; "
                "lower batch_size, or raise --train-limit"
            )
        self.train_size = train.size or train.steps * train.batch_size
        self._ends = False  # whether a test stream is known to end
        self.facts = {"train": train.size, "test": test.size, **(facts or {})}
        with calling(f"data {recipe.data!r}", recipe.root):  # it may import when it is first read
            self._first = next(self.epoch(0))
        self._loss = self._choose_loss()
        self.score = self._choose_score()

    @property
    def metric(self) -> Metric:
        """The metric."""
        return self.score.metric

    def _choose_loss(self) -> Callable[[Any, Any], Tensor] | None:
        """The loss of outputs and targets; None: the model's own, if it takes the targets."""
        name, target = self.recipe.loss, split_batch(self._first)[1]
        if name is None and isinstance(self._first, Mapping):
            return None
        name = name or default_loss(_tensor_target(target))
        if is_reference(name):
            return cast("Callable[[Any, Any], Tensor]", self._own(name, "loss"))
        return self._named_loss(name)

    def _named_loss(self, name: str) -> Callable[[Any, Any], Tensor]:
        smoothing = self.recipe.label_smoothing
        if smoothing and name != "cross-entropy":
            raise RecipeError(
                f"label_smoothing {smoothing} is for cross-entropy, but the loss is {name}"
            )
        function = partial(cross_entropy, label_smoothing=smoothing) if smoothing else LOSSES[name]
        return lambda output, target: function(_logits(output), target)

    def _own(self, reference: str, what: str) -> Callable[..., Any]:
        function = self.recipe.load(reference)
        check_options(function, {}, f"{what} {reference!r}", more=2)
        return cast("Callable[..., Any]", function)

    def _choose_score(self) -> Score:
        name = self.recipe.metric
        if name is not None and is_reference(name):
            up = bool(self.recipe.higher_is_better)
            label = name.rpartition(":")[2]
            metric = Metric(name=label, higher_is_better=up, percent=False)
            return Score(metric, self._own(name, "metric"))
        if name is None:
            name = default_metric(self._loss_name())
        return METRICS[name]

    def _loss_name(self) -> str | None:
        """The name of the loss, if it is a named one of class or real targets."""
        if self._loss is None or (self.recipe.loss and is_reference(self.recipe.loss)):
            return None
        target = _tensor_target(split_batch(self._first)[1])
        name = self.recipe.loss or default_loss(target)
        return None if name == "cross-entropy" and target.is_floating_point() else name

    def model(self) -> nn.Module:
        """A new network on the device."""
        return build_network(self.recipe, {}, **self.known).to(self.device)

    @property
    def known(self) -> dict[str, Any]:
        """What a network may want to know of the data, as far as it is known."""
        return data_facts(self._first, self.train)

    def sample(self) -> Any:
        """The arguments of the forward pass of the first batch."""
        return self.inputs(self._first)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, on the device."""
        once = self.recipe.shuffle == "once"
        batches = self.train.epoch(self.seed, epoch, start, once=once)
        return self._moved(batches, f"epoch {epoch + 1}", start)

    def _moved(self, batches: Iterator[Any], where: str, start: int = 0) -> Iterator[Any]:
        step = start
        while True:
            step += 1
            with told(f"data {self.recipe.data!r}, {where}, batch {step},", self.recipe.root):
                try:
                    batch = plain(next(batches))
                except StopIteration:
                    return
            yield tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), batch)

    def inputs(self, batch: Any) -> Any:
        """The arguments of the forward pass of a batch."""
        return split_batch(batch)[0]

    def tensors(self) -> Iterator[Tensor]:
        """The examples in memory; of datasets and streams, some of them."""
        yield from self.train.digest()
        yield from self.test.digest()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The loss of a batch; the metric if it is a mean over examples."""
        loss, output = self._forward(model, batch)
        function = self.score.function
        if not self.score.is_mean or function is None:
            return loss, loss.detach() if function is None else None
        score = function(_logits(output).detach().float(), split_batch(batch)[1])
        return loss, score.detach()

    def loss_terms(self, batch: Any) -> tuple[float, ...]:
        """The number of examples; of classes, that of the targets that are not ignored (-100).

        A language model's own loss may leave out the first token, which follows no other, or be
        the mean of the examples' means.
        """
        target = split_batch(batch)[1]
        if not isinstance(target, Tensor) or target.is_floating_point() or not target.ndim:
            return (_count(batch),)
        counted = target != -100
        whole = float(counted.sum())
        if self._loss is None and target.ndim > 1:
            return whole, float(counted[:, 1:].sum()), float(_count(batch))
        return (whole,)

    def _forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        with told(self._said, self.recipe.root):
            inputs, target = split_batch(batch)
            if self._loss is None:
                return self._model_loss(model, batch)
            output = call_model(model, inputs)
            return self._checked(self._loss(output, target)), output

    @property
    def _said(self) -> str:
        recipe = self.recipe
        return f"a batch (model {recipe.model!r}, loss {recipe.loss or 'by default'!r})"

    def _model_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The loss that a model returns with the targets among its arguments."""
        key = _target_key(batch)
        takes = inspect.signature(_inner(model).forward).parameters
        if key is None or (key not in takes and not _takes_any(takes)):
            inputs, target = split_batch(batch)
            output = call_model(model, inputs)
            name = default_loss(_tensor_target(target))
            return self._checked(self._named_loss(name)(output, target)), output
        output = call_model(model, batch)
        found = output.get("loss") if isinstance(output, Mapping) else None
        found = getattr(output, "loss", None) if found is None else found
        found = output[0] if found is None and isinstance(output, tuple) else found
        if not isinstance(found, Tensor):
            raise RecipeError(
                f"{type(_inner(model)).__name__} takes {key!r} but returns no loss; name one"
            )
        return self._checked(found), output

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise RecipeError(f"loss {self.recipe.loss!r} must return a scalar tensor, got {what}")
        return loss.reshape(())

    def evaluate(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Evaluation:
        """The loss and the metric of the test set."""
        return self._evaluate(model, autocast, self._moved(self.test.ordered(), "the test part"))

    def _evaluate(
        self,
        model: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        batches: Iterator[Any],
    ) -> Evaluation:
        total, counted, score = 0.0, 0, 0.0
        outputs: list[Any] = []
        targets: list[Any] = []
        function = self.score.function
        for batch in batches:
            with autocast():
                loss, output = self._forward(model, batch)
            count, target = _count(batch), split_batch(batch)[1]
            counted, total = counted + count, total + loss.float().item() * count
            if function is None:
                continue
            output = _single(_logits(output))
            if self.score.is_mean:
                score += float(function(output, target)) * count
            else:
                outputs.append(output)
                targets.append(target)
        if not counted:
            raise RecipeError(f"data {self.recipe.data!r}: the test part is empty")
        if function is None:
            score = total
        elif not self.score.is_mean:
            score = self._whole(outputs, targets) * counted
        return Evaluation(total / counted, {self.metric.name: score / counted})

    def _whole(self, outputs: list[Any], targets: list[Any]) -> float:
        """A metric of all outputs and targets at once."""
        assert self.score.function is not None
        for values in (outputs, targets):
            if len({x.shape[1:] if isinstance(x, Tensor) else None for x in values}) > 1:
                raise RecipeError(
                    f"the metric {self.metric.name!r} is computed from all outputs at once, but "
                    "those of the test batches differ in shape; pad them, or use accuracy or loss"
                )
        together = [torch.cat(x) if isinstance(x[0], Tensor) else x for x in (outputs, targets)]
        with calling(f"metric {self.metric.name!r}", self.recipe.root):
            return float(self.score.function(*together))

    def check(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """One training step on a network that is not used again, and the metric on a test batch.

        Raises:
            RecipeError: what fails, by name.
        """
        self.model()  # a function that returns one network again and again is refused
        with calling(f"a training step of {self._said}", self.recipe.root), preserve_state(model):
            model.train()
            self._check_labels(model)
            with autocast():
                loss, _ = self.loss(model, self._first)
            self._check_loss(loss)
            loss.backward()
            optimizer.step()
        with calling(f"metric {self.metric.name!r}", self.recipe.root), preserve_state(model):
            model.eval()
            first = next(self._moved(self.test.ordered(), "the test part"), None)
            if first is None:
                raise RecipeError(f"data {self.recipe.data!r}: the test part is empty")
            with torch.no_grad():
                self._evaluate(model, autocast, iter([first]))
        if isinstance(self.test, StreamPart) and not self._ends:
            self.test.check_end(max(_LONGEST_TEST, 20 * self.steps_per_epoch))
            self._ends = True

    def _check_labels(self, model: nn.Module) -> None:
        """Raise an error if a class is one that the network has no output for."""
        inputs, target = split_batch(self._first)
        if self._loss_name() != "cross-entropy" or not isinstance(target, Tensor):
            return
        with torch.no_grad():
            outputs = class_scores(_logits(call_model(model, inputs)), target).shape[1]
        if outputs == 1:
            raise RecipeError(
                "cross-entropy of one output is always 0: two classes have two outputs, or one "
                "with the loss bce; the classes found are "
                f"{sorted(map(int, target.unique()))[:5]}"
            )
        held = targets_in_memory(self.train, self.test) or [target]
        for values in (values for values in held if not values.is_floating_point()):
            kept = values[values != -100]
            if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < outputs:
                raise RecipeError(
                    f"the classes are {int(kept.min())} to {int(kept.max())}, but the network has "
                    f"{outputs} outputs, for 0 to {outputs - 1}"
                )

    def _check_loss(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise RecipeError(
                f"loss {self.recipe.loss!r} does not depend on the network's parameters; compute "
                "it from the output without detach, item or argmax"
            )
        if not loss.isfinite():
            bad = any(
                x.is_floating_point() and not x.isfinite().all()
                for x in tree_leaves(self._first)
                if isinstance(x, Tensor)
            )
            why = "the batch itself holds values that are not finite" if bad else "see the loss"
            raise RecipeError(f"the loss of the first batch is {loss.item()}: {why}")


def _target_key(batch: Mapping[str, Any]) -> str | None:
    return next((name for name in TARGETS if name in batch), None)


def _inner(model: nn.Module) -> nn.Module:
    """The network inside DDP, whose signature says what it takes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _tensor_target(target: Any) -> Tensor:
    if not isinstance(target, Tensor):
        raise RecipeError(
            f"the target of a batch is {type(target).__name__}, no tensor; name an own loss, "
            f"or give (x, y) or a dict with one of {', '.join(TARGETS)}"
        )
    return target


def _logits(output: Any) -> Any:
    """The tensor of an output; that of a transformers model is its logits."""
    if isinstance(output, Mapping) and "logits" in output:
        return cast("Mapping[str, Any]", output)["logits"]
    return getattr(output, "logits", output) if not isinstance(output, Tensor) else output


def _single(output: Any) -> Any:
    """Half-precision outputs as fp32."""
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, output)


def _count(batch: Any) -> int:
    """The number of examples of a batch."""
    leaves = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    return len(leaves[0]) if leaves else 1


def make_task(
    recipe: Recipe,
    data: str | None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None,
    test_limit: int | None,
) -> OwnTask:
    """Call the data function or the reader and make the task; see :mod:`dynarank.train.tasks`."""
    if data is not None:
        raise RecipeError(
            f"--data is for built-in data sets; this recipe's is {recipe.data!r}, got --data {data}"
        )
    train, test, facts = _read(recipe)
    train = train if train_limit is None else train.limit(train_limit)
    test = test if test_limit is None else test.limit(test_limit)
    moved = [part.to(device) if isinstance(part, TensorPart) else part for part in (train, test)]
    return OwnTask(recipe, moved[0], moved[1], seed=seed, device=device, facts=facts)


def _read(recipe: Recipe) -> tuple[Part, Part, dict[str, Any]]:
    facts: dict[str, Any] = {"source": recipe.data}
    if (reader := reader_of(recipe.data)) is not None:
        read, place = import_module(READERS[reader]).read, recipe.data.partition(":")[2]
        options = dict(recipe.data_options)
        if reader == "imagefolder":
            options["augment"] = recipe.augment
        if reader == "csv" and recipe.loss in ("mse", "l1", "huber"):
            options.setdefault("task", "regression")  # whole numbers would become classes
        check_options(read, options, f"data {recipe.data!r} with data_options", more=2)
        made, who = read(place, recipe.root, **options), f"data {recipe.data!r}"
    else:
        made, who = _call_data(recipe), f"data function {recipe.data!r}"
    parts = make_parts(
        made, who, recipe.batch_size, workers=recipe.num_workers, steps=recipe.steps_per_epoch
    )
    return *parts, facts


def _call_data(recipe: Recipe) -> Any:
    function = recipe.load(recipe.data)
    known = {"batch_size": recipe.batch_size or 64}
    options = {**accepted(function, known), **recipe.data_options}
    check_options(function, options, f"data {recipe.data!r} with data_options")
    with calling(f"data function {recipe.data!r}", recipe.root), kept_generators():
        seed_generators(_DATA_SEED)  # a random split is the same in every run
        return function(**options)


def sketch(recipe: Recipe) -> Sketch:
    """The network and one batch, on the meta device if it runs there; the data is read for it."""
    task = make_task(
        recipe, None, seed=0, device=torch.device("cpu"), train_limit=None, test_limit=None
    )
    model, sample = sketch_network(recipe, {}, **task.known), task.sample()
    on_meta = tree_map_only(Tensor, lambda x: x.to("meta"), sample)
    with suppress(RuntimeError), torch.no_grad(), preserve_state(model):
        call_model(model, on_meta)
        return Sketch(model, on_meta, f"one batch of {recipe.data}", task.steps_per_epoch)
    with torch.random.fork_rng(devices=[]):  # its forward pass reads values
        model = task.model()
    return Sketch(model, sample, f"one batch of {recipe.data}", task.steps_per_epoch)
