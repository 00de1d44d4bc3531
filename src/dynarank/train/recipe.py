"""The definition of a run: validated settings, those of a TOML file. Times are in epochs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynarank.forms import AdaptedExecution, Rank, RankLike
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.catalog import get_preset
from dynarank.train.registry import DATA, MODELS

__all__ = ["Recipe", "RecipeError", "problems"]

LearningRateSchedule: TypeAlias = Literal[
    "constant", "multistep", "cosine", "linear", "wsd", "onecycle"
]


class RecipeError(ValueError):
    """Raised for an unknown recipe, or one that cannot be run as requested."""


class Recipe(BaseModel):
    """The definition of a run, except for the schedule, the seed and the machine.

    ``decay_at``, ``inflate`` and ``deflate`` are epochs out of ``epochs``. In a run of another
    length they are scaled to the same share, to the step: it is the same experiment, scaled down.
    If ``inflate`` or ``deflate`` is not given, the schedule computes it from the learning rate.

    ``budget`` is the share of the full-rank training FLOPs that a run may cost, see
    :func:`dynarank.train.schedules.make_schedule`. ``rewarmup`` is the number of LR re-warm-up
    steps after each change of form; ``recalibrate_batch_norms`` turns on BatchNorm recalibration
    after truncations.

    ``warmup`` is a share of the run, ``final_rate`` a share of the learning rate; see
    :func:`dynarank.train.rates.make_lr_scheduler`. ``model_options`` are the options of the
    network, such as its dropout, and ``data_options`` those of the data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    data: str
    data_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    model: str
    model_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    layers: tuple[str, ...]
    schedules: tuple[str, ...]

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    lr_schedule: LearningRateSchedule = "multistep"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    decay_at: tuple[float, ...] = ()
    decay_factor: float = Field(default=0.1, gt=0)
    final_rate: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: bool = False
    shuffle: Literal["epoch", "once"] = "epoch"
    init: Literal["spectral", "published"] = "spectral"

    rank: int | float | Rank = 0.5
    decomposition: str = "svd"
    inflate: float | None = Field(default=None, gt=0)
    deflate: float | None = Field(default=None, gt=0)
    alpha: float = Field(default=16.0, gt=0)
    execution: AdaptedExecution = "auto"
    budget: float | None = Field(default=None, gt=0)
    moments: Literal["project", "calibrated", "reset", "prune"] = "project"
    rewarmup: int = Field(default=0, ge=0)
    recalibrate_batch_norms: bool = True
    as_published: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="after")
    def _known(self) -> Self:
        for what, name, known in (("data", self.data, DATA), ("model", self.model, MODELS)):
            if name not in known:
                raise ValueError(f"{what} is one of {', '.join(known)}, got {name!r}")
        for name in self.schedules:
            get_preset(name)
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        given = [epoch for epoch in (self.inflate, self.deflate) if epoch is not None]
        if any(one >= two for one, two in pairwise([*given, self.epochs])):
            raise ValueError(
                f"inflate < deflate < epochs must hold, got {self.inflate}, {self.deflate}, "
                f"{self.epochs}"
            )
        return self

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.lr_schedule == "wsd" and len(self.decay_at) != 1:
            raise ValueError(
                f"wsd has one decay: decay_at must have one value, got {self.decay_at}"
            )
        if self.lr_schedule == "onecycle" and not self.warmup:
            raise ValueError("onecycle rises before it falls: warmup must be above 0, got 0")
        edges = [self.warmup * self.epochs, *self.decay_at, self.epochs]
        if any(one >= two for one, two in pairwise(edges)):
            raise ValueError(
                f"decay_at must increase between the warm-up's end, epoch {edges[0]:g}, and the "
                f"run's, {self.epochs}; got {self.decay_at}"
            )
        return self

    def published(self) -> Recipe:
        """The recipe with the settings of the published code, including its bugs.

        Raises:
            RecipeError: the recipe is not a published experiment.
        """
        if not self.as_published:
            raise RecipeError(
                f"recipe {self.name!r} is not a published experiment; omit --as-published"
            )
        return Recipe.model_validate({**self.model_dump(), **self.as_published})

    def with_factors(self, rank: RankLike | None, decomposition: str | None) -> Recipe:
        """The recipe with another rank or decomposition; None: unchanged."""
        changed: dict[str, Any] = {}
        if rank is not None:
            changed["rank"] = rank
        if decomposition is not None:
            changed["decomposition"] = decomposition
        return Recipe.model_validate({**self.model_dump(), **changed})

    def with_budget(self, flops: float | None) -> Recipe:
        """The recipe with a budget, a share of the full-rank training FLOPs; None: unchanged."""
        if flops is None:
            return self
        return Recipe.model_validate({**self.model_dump(), "budget": flops})

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with other settings, by key; ``model_options.width`` is one within a table.

        Raises:
            RecipeError: an unknown key, with the nearest known one, or a value that is not possible.

        Example:
            >>> from dynarank.train.recipes import load_recipe
            >>> load_recipe("digits").with_settings({"learning_rate": 0.2, "rank.value": 0.5}).rank
            Rank(value=0.5, of='out', multiple_of=1)
        """
        values = self.model_dump()
        for key, value in settings.items():
            _place(values, key, value)
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            key, problem = problems(error)[0]
            raise RecipeError(f"recipe {self.name!r}, setting {key!r}: {problem}") from error

    def share(self, epoch: float) -> float:
        """Convert an epoch to a share of the run."""
        return epoch / self.epochs

    def schedule(self, name: str) -> RankSchedule:
        """The named schedule, constructed from this recipe's options.

        Raises:
            ValueError: an unknown schedule.
        """
        given = {"inflate": self.inflate, "deflate": self.deflate}
        points = {name: self.share(epoch) for name, epoch in given.items() if epoch is not None}
        return get_preset(name)(
            rank=self.rank,
            **points,
            decomposition=self.decomposition,
            alpha=self.alpha,
            execution=self.execution,
            epoch=self.share(1),
            budget=self.budget,
        )


def problems(error: ValidationError) -> list[tuple[str, str]]:
    """The keys of a recipe that are wrong, each with the problem; ``""`` for several together."""
    found: list[tuple[str, str]] = []
    for one in error.errors():
        key = ".".join(str(part) for part in one["loc"] if not _of_a_union(part))
        message = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if one["type"] == "extra_forbidden":
            message = f"unknown key{_nearest(key)}"
        elif one["type"] == "missing":
            message = "required, but missing"
        elif one["msg"].startswith("Input should be "):
            message = f"it must be {message}, got {one['input']!r}"
        found.append((key, message))
    return found


def _of_a_union(part: int | str) -> bool:
    """Whether a part of a place names an alternative, such as ``float`` of ``int | float``."""
    return part in ("int", "float", "Rank")


def _place(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key in a recipe's values; dots lead into tables."""
    first, *rest = key.split(".")
    if first not in Recipe.model_fields:
        raise RecipeError(f"unknown setting {key!r}{_nearest(first)}")
    inner: dict[str, Any] = values
    for name, following in zip([first, *rest], rest, strict=False):
        if not isinstance(inner.get(name), dict):
            if name != "rank" and name in Recipe.model_fields:
                raise RecipeError(f"setting {key!r}: {name} is no table, it has no {following!r}")
            inner[name] = {}
        inner = cast("dict[str, Any]", inner[name])
    inner[key.rpartition(".")[2]] = value


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(Recipe.model_fields)}"
