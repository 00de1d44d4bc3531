"""The settings of a ``train``: what its options say, or what a run folder says that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dynarank.files.json_data import DamagedFileError
from dynarank.train.grid import COMMON, Job, read_common
from dynarank.train.recipes import Recipe, RecipeError, load_recipe, recipe_names

__all__ = ["TrainSettings", "find_train"]


class TrainSettings(BaseModel):
    """The settings of a ``train``, as its run folder stores them."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    schedules: tuple[str, ...]
    seed: int = 0
    epochs: int
    train_limit: int | None = None
    test_limit: int | None = None
    precision: str = "auto"
    compile: bool = False
    measure: bool = False
    noise: bool = False
    data: str | None = None
    log: str | None = None

    @classmethod
    def of(cls, name: str | None, stored: dict[str, Any] | None) -> TrainSettings:
        """The settings of a recipe, or stored ones.

        Raises:
            RecipeError: neither, an unknown recipe, or stored settings of another recipe.
            DamagedFileError: the stored settings are none.
        """
        if stored is None:
            if name is None:
                known = ", ".join(recipe_names())
                raise RecipeError(f"name a recipe, or a run to go on with (--resume RUN): {known}")
            recipe = load_recipe(name)
            return cls(recipe=recipe, schedules=recipe.schedule_names, epochs=recipe.epochs)
        try:
            found = cls.model_validate(stored)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedFileError(
                COMMON, f"{where}: {error.errors()[0]['msg']}", "repeat the command with --out RUN"
            ) from error
        if name is not None and found.recipe.name not in (name, Path(name).stem):
            raise RecipeError(f"the run to go on with is of {found.recipe.name}, not of {name}")
        return found

    def with_options(self, schedules: str | None, **options: Any) -> TrainSettings:
        """The settings with the options that are given: neither None nor False."""
        given = {name: value for name, value in options.items() if value not in (None, False)}
        if schedules is not None:
            names = [name.strip() for name in schedules.split(",")]
            for name in names:
                options["recipe"].check_schedule(name)
            given["schedules"] = tuple(dict.fromkeys(names))
        return self.model_copy(update=given)

    @property
    def backends(self) -> list[str]:
        """The logging backends."""
        return [name.strip() for name in self.log.split(",")] if self.log else []

    def jobs(self, folder: Path) -> list[Job]:
        """A job for each schedule, in a folder of its own if there are several."""
        several = len(self.schedules) > 1
        return [
            Job(folder / name if several else folder, self.recipe, name, self.seed)
            for name in self.schedules
        ]


def find_train(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the ``train`` that a run belongs to, and its stored settings.

    Raises:
        RecipeError: there is none.
        DamagedFileError: its settings cannot be read.
    """
    above = run.resolve().parents[:2]  # "." and links do not say what they lie in
    for folder in (run, run.parent, run.parent.parent, *above):
        try:
            there = read_common(folder)
        except DamagedFileError as error:
            way_out = f"repeat the command with --out {folder}"
            raise DamagedFileError(error.name, error.problem, way_out) from error
        if there is None:
            continue
        if (command := there.get("command")) != "train":
            raise RecipeError(
                f"{run} is part of a {command}: the same `dynarank {command}` command goes on"
            )
        return folder, there
    raise RecipeError(
        f"{run} is not the run folder of a `dynarank train`: there is no {COMMON}; the same "
        f"command with --out {run} goes on with a run that is there"
    )
