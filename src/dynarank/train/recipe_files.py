"""A user's own recipe: a TOML file, a Python file or an object in a module.

A Python file has ``recipe``: a :class:`Recipe`, a dict of its settings, or a function that returns
one of these. There, functions and classes may stand where names do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from dynarank.files.reading import DamagedFileError, read_bytes
from dynarank.train.own_code import (
    calling,
    importable,
    load_file,
    load_object,
    package_root,
    reference_to,
)
from dynarank.train.recipe import OWN_KEYS, Recipe, problems
from dynarank.train.recipe_error import RecipeError

__all__ = ["is_own_recipe", "load_own_recipe"]

_MAX_BYTES = 1 << 20
_OBJECT = "recipe"


def is_own_recipe(name: str) -> bool:
    """Whether a name is that of a file or an object, not of a built-in recipe.

    Example:
        >>> [is_own_recipe(name) for name in ("my.toml", "a/my.py", "my.py:small", "digits")]
        [True, True, True, False]
    """
    return name.endswith((".toml", ".py")) or ":" in name


def load_own_recipe(name: str) -> Recipe:
    """Load ``FILE.toml``, ``FILE.py``, ``FILE.py:object`` or ``module:object``.

    Raises:
        RecipeError: it cannot be read or is no recipe: the file, the key and the nearest known key.
    """
    place, _, attribute = name.rpartition(":") if not Path(name).is_file() else (name, "", "")
    if not place or (name.endswith((".toml", ".py")) and not attribute):
        place, attribute = name, ""
    if place.endswith(".toml"):
        return _from_toml(Path(place).expanduser())
    if place.endswith(".py"):
        return _from_python(Path(place).expanduser(), attribute or _OBJECT)
    return _from_module(place, attribute)


def _from_toml(path: Path) -> Recipe:
    try:
        text = read_bytes(path.resolve(), _MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path} is not there; `dynarank init {path}` writes one") from None
    except (DamagedFileError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML in UTF-8: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: {error}; this is not TOML") from error
    return _made(values, path, text, path.resolve().parent)


def _from_python(path: Path, attribute: str) -> Recipe:
    if not path.is_file():
        raise RecipeError(f"{path} is not there; `dynarank init NAME.toml --python` writes one")
    load_file(path)
    value = load_object(f"{path.name}:{attribute}", path.resolve().parent)
    return _of_value(value, path, f"{path}:{attribute}")


def _from_module(name: str, attribute: str) -> Recipe:
    folder = Path.cwd()
    value = load_object(f"{name}:{attribute}", folder)
    with importable(folder):
        module = __import__(name, fromlist=[""])
    path = Path(getattr(module, "__file__", None) or folder / f"{name}.py").resolve()
    return _of_value(value, path, f"{name}:{attribute}", package_root(module, path))


def _of_value(value: Any, path: Path, where: str, root: Path | None = None) -> Recipe:
    """The recipe that an object in a Python file is, or returns.

    Args:
        value: the object.
        path: the file.
        where: the object's name, for messages.
        root: the folder that the recipe's files and modules are in; None: the file's.
    """
    root = path.resolve().parent if root is None else root
    if callable(value) and not isinstance(value, type):
        with calling(where, root):
            value = value()
    if isinstance(value, Recipe):
        value = value.model_dump(exclude_unset=True)
    if not isinstance(value, Mapping):
        raise RecipeError(
            f"{where} must be a Recipe, a dict of its settings or a function that returns one, got "
            f"{value!r}"
        )
    named = dict(cast("Mapping[str, Any]", value))
    named = {key: _named(key, one, path, root) for key, one in named.items()}
    return _made({**named, "name": named.get("name") or path.stem}, path, "", root)


def _named(key: str, value: Any, path: Path, root: Path) -> Any:
    """A setting with references in place of functions and classes."""
    if isinstance(value, tuple | list):
        return [_named(key, one, path, root) for one in cast("list[Any]", value)]
    if not callable(value):
        return value
    try:
        return reference_to(value, root)
    except RecipeError as error:
        raise RecipeError(f"{path}, {key}: {error}") from error


def _made(values: Mapping[str, Any], path: Path, text: str, root: Path) -> Recipe:
    """The recipe of a file, with the digests of its own code.

    Raises:
        RecipeError: a key is unknown, missing or wrong.
    """
    for key in ("folder", "sources"):
        if key in values:
            raise RecipeError(f"{path}{_line(text, key)}: {key} is found by itself; leave it out")
    given = {"name": path.stem, **values, "folder": str(root)}
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        told = "; ".join(_told(path, text, *one) for one in problems(error)[:5])
        raise RecipeError(told) from error
    for key in OWN_KEYS:
        for reference in recipe.references_of(key):
            try:
                recipe.load(reference)
            except RecipeError as error:
                raise RecipeError(f"{path}{_line(text, key)}, {key}: {error}") from error
    return recipe.sealed()


def _told(path: Path, text: str, key: str, problem: str) -> str:
    named = f", {key}" if key else ""
    return f"{path}{_line(text, key)}{named}: {problem}"


def _line(text: str, key: str) -> str:
    """The line of a key, if it is in the text under its own name."""
    first, *rest = key.split(".")
    for name in (rest[-1:] or [first]) + [first]:
        pattern = rf"^\s*(\[\s*)?[\"']?{re.escape(name)}[\"']?\s*(=|\.|\])"
        if name and (found := re.search(pattern, text, re.MULTILINE)):
            return f", line {text.count(chr(10), 0, found.start(0)) + 1}"
    return ""
