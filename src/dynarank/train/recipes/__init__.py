"""Recipes: one run, one typed file. Times are epochs of the recipe's own length."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynarank.forms import AdaptedExecution
from dynarank.schedules import Schedule, get_preset

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names"]


class RecipeError(ValueError):
    """A recipe that is not known, or cannot be run as asked."""


class Recipe(BaseModel):
    """Everything that defines a run but the schedule, the seed and the machine.

    ``decay_at``, ``inflate`` and ``deflate`` are epochs out of ``epochs``. A run of another length
    keeps them at the same share of it, to the step: it is the same experiment in small.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    data: Literal["digits", "cifar10"]
    model: Literal["digits-net", "resnet20"]
    layers: tuple[str, ...]
    schedules: tuple[str, ...]

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    decay_at: tuple[float, ...] = ()
    decay_factor: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: bool = False
    shuffle: Literal["epoch", "once"] = "epoch"
    init: Literal["spectral", "published"] = "spectral"

    rank: float | int = 0.5
    decomposition: str = "svd"
    inflate: float = Field(gt=0)
    deflate: float = Field(gt=0)
    alpha: float = Field(default=16.0, gt=0)
    execution: AdaptedExecution = "auto"
    moments: Literal["project", "calibrated", "reset"] = "project"
    as_published: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.inflate < self.deflate < self.epochs:
            raise ValueError(
                f"inflate < deflate < epochs must hold, got {self.inflate}, {self.deflate}, "
                f"{self.epochs}"
            )
        for name in self.schedules:
            get_preset(name)
        return self

    def published(self) -> Recipe:
        """The recipe as the published code runs it, faults included.

        Raises:
            RecipeError: the recipe is not of a published experiment.
        """
        if not self.as_published:
            raise RecipeError(
                f"recipe {self.name!r} is no published experiment; leave out the switch"
            )
        return Recipe.model_validate({**self.model_dump(), **self.as_published})

    def with_factors(self, rank: float | None, decomposition: str | None) -> Recipe:
        """The recipe with another rank (above 1 a number of directions) or decomposition."""
        changed: dict[str, Any] = {}
        if rank is not None:
            changed["rank"] = int(rank) if rank > 1 or rank == int(rank) else rank
        if decomposition is not None:
            changed["decomposition"] = decomposition
        return Recipe.model_validate({**self.model_dump(), **changed})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}[self.data]

    @property
    def classes(self) -> int:
        """How many classes the data has."""
        return 10

    def share(self, epoch: float) -> float:
        """An epoch as a share of the run."""
        return epoch / self.epochs

    def schedule(self, name: str) -> Schedule:
        """The named schedule, with this recipe's rank and moments of change.

        Raises:
            ValueError: an unknown schedule.
        """
        return get_preset(name)(
            rank=self.rank,
            inflate=self.share(self.inflate),
            deflate=self.share(self.deflate),
            decomposition=self.decomposition,
            alpha=self.alpha,
            execution=self.execution,
        )


def recipe_names() -> list[str]:
    """The names of the recipes there are."""
    folder = files("dynarank.train.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        RecipeError: there is none; the message lists those there are and the nearest.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise RecipeError(f"unknown recipe {name!r}{hint} Known recipes: {', '.join(names)}.")
    text = (files("dynarank.train.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    return Recipe(name=name, **tomllib.loads(text))
