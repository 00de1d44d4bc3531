"""The definition of a run: validated settings, those of a TOML file. Times are in epochs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import to_jsonable_python

from dynarank.forms import AdaptedExecution, Rank
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.catalog import SCHEDULES, get_preset
from dynarank.train.losses import LOSSES
from dynarank.train.own_code import is_reference, load_object, source_digests
from dynarank.train.own_metrics import METRICS
from dynarank.train.own_schedule import own_schedule
from dynarank.train.recipe_error import RecipeError
from dynarank.train.registry import DATA, MODELS, READERS, TEXT_READER

__all__ = [
    "LR_SCHEDULES",
    "OPTIMIZERS",
    "OWN_KEYS",
    "Recipe",
    "problems",
    "reader_of",
]

LR_SCHEDULES: Mapping[str, Sequence[str]] = {
    "constant": ("warmup",),
    "multistep": ("warmup", "decay_at", "decay_factor"),
    "cosine": ("warmup", "final_rate"),
    "linear": ("warmup", "final_rate"),
    "wsd": ("warmup", "decay_at", "final_rate"),
    "onecycle": ("warmup",),
}
"""The LR schedules, each with the settings that only some of them read."""
OPTIMIZERS: Mapping[str, Sequence[str]] = {"sgd": ("momentum",), "adamw": ("betas",)}
"""The optimizers, each with the settings that only some of them read."""
OWN_KEYS = ("data", "model", "loss", "metric", "optimizer", "lr_schedule", "schedules")
"""The settings that may name own code."""

_Count: TypeAlias = Annotated[int, Field(strict=True, ge=1)]
_Number: TypeAlias = Annotated[float, Field(strict=True)]
_Names: TypeAlias = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
_BATCH = 64


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

    ``data``, ``model``, ``loss``, ``metric``, ``optimizer``, ``lr_schedule`` and ``schedules`` may
    be own code, see :mod:`dynarank.train.own_code`; ``sources`` has the digests of its files, and
    ``folder`` is where they are. ``loss`` and ``metric`` are for own data, by default those that
    suit its targets. ``batch_size`` 0 is the own data loader's. ``layers`` None: those that every
    function of the library takes by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = ""
    summary: str = ""
    folder: str | None = None
    sources: dict[str, str] | None = None
    data: str
    data_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    num_workers: int = Field(default=0, ge=0, strict=True)
    steps_per_epoch: _Count | None = None
    model: str
    model_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    layers: _Names | None = None
    loss: str | None = None
    metric: str | None = None
    higher_is_better: bool | None = None
    schedules: _Names = ("full-rank", "low-rank", "dynamic-rank")

    epochs: _Count = Field(le=1_000_000)
    batch_size: int = Field(default=0, ge=0, strict=True)
    optimizer: str = "sgd"
    optimizer_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    learning_rate: _Number = Field(gt=0)
    momentum: _Number = Field(default=0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: _Number = Field(default=0.0, ge=0)
    clip_norm: _Number | None = Field(default=None, gt=0)
    lr_schedule: str = "multistep"
    warmup: _Number = Field(default=0.0, ge=0, lt=1)
    decay_at: tuple[float, ...] = ()
    decay_factor: _Number = Field(default=0.1, gt=0)
    final_rate: _Number = Field(default=0.0, ge=0, lt=1)
    label_smoothing: _Number = Field(default=0.0, ge=0, lt=1)
    augment: bool = Field(default=False, strict=True)
    shuffle: Literal["epoch", "once"] = "epoch"
    init: Literal["spectral", "published"] = "spectral"

    rank: StrictInt | StrictFloat | Rank = 0.5
    decomposition: str = "svd"
    inflate: _Number | None = Field(default=None, gt=0)
    deflate: _Number | None = Field(default=None, gt=0)
    alpha: _Number = Field(default=16.0, gt=0)
    execution: AdaptedExecution = "auto"
    budget: _Number | None = Field(default=None, gt=0)
    moments: Literal["project", "calibrated", "reset", "prune"] = "project"
    rewarmup: int = Field(default=0, ge=0, strict=True)
    recalibrate_batch_norms: bool = Field(default=True, strict=True)
    as_published: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="wrap")
    @classmethod
    def _defaults(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The defaults that follow other settings count as not given, so that they go on to."""
        if not isinstance(values, dict):
            return handler(values)
        given = cast("dict[str, Any]", values)
        derived = _derived(given)
        made = handler({**derived, **given})
        made.model_fields_set.difference_update(derived.keys() - given.keys())
        return made

    @model_validator(mode="after")
    def _known(self) -> Self:
        if set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise ValueError(f"the name of a recipe is that of its run folders, got {self.name!r}")
        _check_data(self.data)
        _check_name("model", self.model, MODELS)
        _check_name("optimizer", self.optimizer, OPTIMIZERS)
        _check_name("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        if self.loss is not None:
            _check_name("loss", self.loss, LOSSES)
        if self.metric is not None:
            _check_name("metric", self.metric, METRICS)
        for name in self.schedules:
            if not is_reference(name):
                get_preset(name)
        names = self.schedule_names
        if taken := [name for name in names if names.count(name) > 1 or self._shadows(name)]:
            raise ValueError(f"two schedules have the name {taken[0]!r}; rename the function")
        return self

    def _shadows(self, name: str) -> bool:
        return name in SCHEDULES and name not in self.schedules

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Every setting has an effect."""
        for key, used, where in self._conditions():
            default, value = type(self).model_fields[key].default, getattr(self, key)
            if value != default and not used:
                reset = "" if default is None else f", or set it to {_toml(default)}"
                raise ValueError(
                    f"{key} has no effect here: it is for {where}; got {_toml(value)}, leave it "
                    f"out{reset}"
                )
        own = () if is_reference(self.optimizer) else ("weight_decay", *OPTIMIZERS[self.optimizer])
        if taken := sorted({"lr", *own} & self.optimizer_options.keys()):
            key = "learning_rate" if taken[0] == "lr" else taken[0]
            raise ValueError(f"optimizer_options has {taken[0]!r}: set {key} in the recipe")
        if self.metric is not None and is_reference(self.metric) and self.higher_is_better is None:
            raise ValueError(
                f"higher_is_better must be true or false for the metric {self.metric!r}"
            )
        return self

    def _conditions(self) -> Iterator[tuple[str, bool, str]]:
        """Each setting that not every recipe reads, whether this one does, and which do."""
        own = self.has_own_data
        kind = "" if own else DATA[self.data.partition(":")[0]]
        own_metric = self.metric is not None and is_reference(self.metric)
        smooth = self.data != "stsb" if not own else self.loss in (None, "cross-entropy")
        images = self.data.startswith("imagefolder:") or kind == DATA["digits"]
        for key in ("loss", "metric", "steps_per_epoch"):
            yield key, own, "own data; built-in data sets have their own"
        yield "num_workers", own, "own data; built-in data sets are in memory"
        yield "higher_is_better", own_metric, "a metric of your own"
        yield "label_smoothing", smooth, "the loss cross-entropy"
        yield "augment", images, "images, built-in or read as imagefolder:DIR"
        yield "shuffle", kind != DATA["text"], "other data than text"
        yield from _read_by("optimizer", self.optimizer, OPTIMIZERS, "; use optimizer_options")
        yield from _read_by("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        if self.lr_schedule == "multistep":
            yield "decay_factor", bool(self.decay_at), "the epochs in decay_at, of which are none"

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
        return Recipe.model_validate({**self._chosen(), **self.as_published})

    def _chosen(self) -> dict[str, Any]:
        """The settings, without defaults that follow other settings."""
        return self.model_dump(exclude=_derived({}).keys() - self.model_fields_set)

    @property
    def has_own_data(self) -> bool:
        """Whether the data is none of the built-in sets."""
        return self.data not in DATA and reader_of(self.data) != TEXT_READER

    @property
    def root(self) -> Path:
        """The folder that own files are relative to."""
        return Path(self.folder or ".").expanduser()

    @property
    def references(self) -> list[str]:
        """The names of all own code."""
        return [name for key in OWN_KEYS for name in self.references_of(key)]

    def references_of(self, key: str) -> list[str]:
        """The names of own code that a setting gives."""
        value = getattr(self, key)
        names = [value] if isinstance(value, str) else value or []
        if key == "data" and reader_of(self.data):
            return []
        return [name for name in names if is_reference(name)]

    @property
    def schedule_names(self) -> tuple[str, ...]:
        """The names of the schedules; that of an own one is its function's."""
        return tuple(name.rpartition(":")[2] for name in self.schedules)

    def load(self, reference: str) -> Any:
        """The object of own code that a reference of this recipe names.

        Raises:
            RecipeError: it cannot be loaded, or a file has changed since the recipe was.
        """
        if self.sources is not None:
            self._check_sources()
        return load_object(reference, self.root)

    def _check_sources(self) -> None:
        now = source_digests(self.references, self.root)
        for name, digest in (self.sources or {}).items():
            if digest != now.get(name):
                raise RecipeError(
                    f"{self.root / name} has changed since the run began (SHA-256 {digest[:12]} "
                    f"there, {str(now.get(name))[:12]} now); restore it, or start another run with "
                    "--out"
                )

    def sealed(self) -> Recipe:
        """The recipe with the digests of its own code, which is loaded; the same if it has none."""
        if not (references := self.references):
            return self.model_copy(update={"sources": None})
        return self.model_copy(update={"sources": source_digests(references, self.root)})

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with other settings, by key; ``model_options.width`` is one within a table.

        Raises:
            RecipeError: an unknown key, with the nearest known one, or a value that is wrong.

        Example:
            >>> from dynarank.train.recipes import load_recipe
            >>> load_recipe("digits").with_settings({"learning_rate": 0.2, "rank.value": 0.5}).rank
            Rank(value=0.5, of='out', multiple_of=1)
        """
        values = self._chosen()
        for key, value in settings.items():
            _place(values, key, value)
        try:
            changed = Recipe.model_validate(values)
        except ValidationError as error:
            key, problem = problems(error)[0]
            named = f", setting {key!r}" if key else ""
            raise RecipeError(f"recipe {self.name!r}{named}: {problem}") from error
        return changed if changed.references == self.references else changed.sealed()

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
        options = {
            "rank": self.rank,
            **points,
            "decomposition": self.decomposition,
            "alpha": self.alpha,
            "execution": self.execution,
            "epoch": self.share(1),
            "budget": self.budget,
        }
        for reference in self.schedules:
            if is_reference(reference) and name == reference.rpartition(":")[2]:
                return own_schedule(self.load(reference), reference, options, self.root)
        self.check_schedule(name)
        return get_preset(name)(**options)

    def check_schedule(self, name: str) -> None:
        """Raise an error if a schedule is neither a named one nor one of this recipe's own.

        Raises:
            ValueError: an unknown schedule.
        """
        if is_reference(name):
            raise RecipeError(
                f"add {name!r} to the schedules of the recipe, then ask for it by "
                f"{name.rpartition(':')[2]!r}"
            )
        if name not in self.schedule_names:
            get_preset(name)


def _derived(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that follow from other settings."""
    own = is_reference(data := str(given.get("data"))) and reader_of(data) is None
    return {
        "lr_schedule": "multistep" if given.get("decay_at") else "cosine",
        "batch_size": 0 if own else _BATCH,
    }


def _read_by(
    key: str, chosen: str, table: Mapping[str, Sequence[str]], instead: str = ""
) -> Iterator[tuple[str, bool, str]]:
    """Each setting of a table, whether the chosen one reads it, and which do."""
    for setting in dict.fromkeys(name for names in table.values() for name in names):
        readers = [name for name, names in table.items() if setting in names]
        where = f"{key} {', '.join(readers)}, not for {chosen!r}"
        hint = instead if is_reference(chosen) else ""
        yield setting, chosen in readers, where + hint


def _toml(value: Any) -> str:
    """A setting's value as it stands in a recipe."""
    return json.dumps(to_jsonable_python(value))


def reader_of(data: str) -> str | None:
    """The reader in ``csv:FILE``; None if the data is not read by one."""
    name, colon, _ = data.partition(":")
    return name if colon and name in (*READERS, TEXT_READER) else None


def _check_data(name: str) -> None:
    """Raise ValueError if data is neither built in nor read nor own."""
    kinds = [*READERS, TEXT_READER]
    prefix, _, place = name.partition(":")
    near = difflib.get_close_matches(prefix, kinds, 1, 0.6)
    if reader_of(name) is None and near and set(place) & set("./\\"):
        raise ValueError(f"data {name!r}: unknown reader {prefix!r}; did you mean {near[0]!r}?")
    if reader_of(name) is None:
        _check_name("data", name, DATA, [f"{kind}:..." for kind in kinds])


def _check_name(key: str, name: str, known: Iterable[str], more: Sequence[str] = ()) -> None:
    if name in known or is_reference(name):
        return
    listed = ", ".join([*known, *more])
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} is one of {listed}, or file.py:function, got {name!r}{hint}")


def problems(error: ValidationError) -> list[tuple[str, str]]:
    """The keys of a recipe that are wrong, each with the problem; ``""`` for several together."""
    found: dict[str, str] = {}
    for one in error.errors():
        parts = [str(part) for part in one["loc"]]
        key = ".".join(part for part in parts if part not in ("int", "float", "Rank"))
        if one["type"] == "extra_forbidden":
            found[key] = f"unknown key{_nearest(key)}"
        elif one["type"] == "missing":
            found[key] = "required, but missing"
        elif parts and parts[0] == "rank" and not isinstance(one["input"], dict):
            found[key] = f"a rank is {_RANKS}, got {one['input']!r}"
        elif not (parts[:1] == ["rank"] and parts[1:2] in (["int"], ["float"])):
            found[key] = _message(one["msg"], one["input"])
    return list(found.items())


_RANKS = 'a number (int), a share of the cost (float) or { value = 0.25, of = "out" }'


def _message(message: str, value: Any) -> str:
    text = message.removeprefix("Value error, ")
    return text if text != message else f"{message[0].lower()}{message[1:]}, got {value!r}"


def _place(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key in a recipe's values; dots lead into tables."""
    first, *rest = key.split(".")
    if first not in _SETTINGS:
        raise RecipeError(f"unknown setting {key!r}{_nearest(first)}")
    inner: dict[str, Any] = values
    for name, following in zip([first, *rest], rest, strict=False):
        if not isinstance(inner.get(name), dict):
            if name != "rank" and name in Recipe.model_fields:
                raise RecipeError(f"setting {key!r}: {name} is no table, it has no {following!r}")
            inner[name] = {}
        inner = cast("dict[str, Any]", inner[name])
    inner[key.rpartition(".")[2]] = value


_SETTINGS = [name for name in Recipe.model_fields if name not in ("folder", "sources")]
_SHORT = {"lr": "learning_rate", "bs": "batch_size", "scheduler": "lr_schedule"}


def _nearest(key: str) -> str:
    """The known key that may have been meant."""
    near = [_SHORT[key]] if key in _SHORT else difflib.get_close_matches(key, _SETTINGS, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_SETTINGS)}"
