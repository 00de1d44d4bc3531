"""A recipe's own code: functions named as ``file.py:function`` or ``module:function``.

Files are relative to the recipe's folder, which is importable while they are loaded and called. The
SHA-256 of each file identifies a run: if one changes, the run is another.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from dynarank.train.recipe_error import RecipeError
from dynarank.train.registry import READERS, TEXT_READER

__all__ = [
    "accepted",
    "calling",
    "check_options",
    "importable",
    "is_reference",
    "load_file",
    "load_object",
    "package_root",
    "reference_to",
    "source_digests",
    "told",
]

_LOADED: dict[str, tuple[Path, str]] = {}
"""The modules that were imported for recipes: their files, and the digests of those."""

_INSTALLED = {"site-packages", "dist-packages"}


def is_reference(name: str) -> bool:
    """Whether a name has the form ``file.py:function`` or ``module:function``.

    Example:
        >>> is_reference("net.py:build"), is_reference("torch.optim:Adam"), is_reference("resnet20")
        (True, True, False)
    """
    place, _, attribute = name.rpartition(":")
    dotted = place.removesuffix(".py") if place.endswith(".py") else place
    named = bool(dotted) if place.endswith(".py") else _is_dotted(dotted)
    return named and _is_dotted(attribute)


def _is_dotted(name: str) -> bool:
    return bool(name) and all(part.isidentifier() for part in name.split("."))


def load_object(reference: str, folder: Path) -> Any:
    """The object that a reference names.

    Args:
        reference: ``file.py:name`` or ``module:name``; a name may have dots.
        folder: the recipe's folder: files and modules are looked for here first.

    Raises:
        RecipeError: the file or module is not there or cannot be imported, or has no such name.

    Example:
        >>> load_object("torch.optim:Adam", Path())
        <class 'torch.optim.adam.Adam'>
    """
    place, _, attribute = reference.rpartition(":")
    module = load_file(folder / place) if place.endswith(".py") else _import(place, folder)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            there = [one for one in vars(found) if not one.startswith("_")]
            has = ", ".join(there[:20]) or "nothing"
            raise RecipeError(f"{reference!r}: {place} has no {name!r}; it has {has}")
        found = getattr(found, name)
    return found


@contextmanager
def importable(*folders: Path) -> Generator[None]:
    """A context in which the modules in some folders can be imported, before all others.

    Modules that an earlier call has imported from other folders, or that have changed since, are
    imported again.
    """
    roots = list(dict.fromkeys(str(folder.resolve()) for folder in folders))
    _forget_others(roots)
    before = set(sys.modules)
    inserted = [root for root in roots if root not in sys.path]
    finder = _Finder(roots)
    sys.path[:0] = inserted
    sys.meta_path.insert(_before_paths(), finder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.meta_path[:] = [one for one in sys.meta_path if one is not finder]
        for root in inserted:
            if root in sys.path:
                sys.path.remove(root)
        for name in set(sys.modules) - before:
            path = _file_of(sys.modules[name]) or _folder_of(sys.modules[name])
            ours = name.partition(".")[0] == "dynarank"  # in an editable install
            if path is not None and not ours and _inside(path, roots):
                _LOADED[name] = path, _digest(path)


class _Source(SourceFileLoader):
    """Compiles a file as it is now.

    A cached ``.pyc`` is told from its source by the time in whole seconds and the size. After a
    quick edit of equal length Python would run the old code, under the digest of the new one.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and has those in some folders read by :class:`_Source`."""

    def __init__(self, roots: list[str]) -> None:
        self.roots = roots

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            if _inside(Path(spec.loader.path).resolve(), self.roots):
                spec.loader = _Source(name, spec.loader.path)
        return spec


def _before_paths() -> int:
    """Where in ``sys.meta_path`` Python's own search of ``sys.path`` is."""
    return sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)


def _forget_others(roots: list[str]) -> None:
    """Have modules imported again that have changed, or that other folders have by that name."""
    if any(_digest(path) != digest for path, digest in _LOADED.values()):
        old = set(_LOADED)  # the others may have imported what changed
    else:
        old = {n for n, (path, _) in _LOADED.items() if not _inside(path, roots) and _in(n, roots)}
    for name in old:
        _LOADED.pop(name)
        sys.modules.pop(name, None)


def _in(name: str, roots: list[str]) -> bool:
    """Whether one of the folders has a module or package of that name."""
    places = [Path(root, name.partition(".")[0]) for root in roots]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def _inside(path: Path, roots: Iterable[str]) -> bool:
    return not _INSTALLED & set(path.parts) and any(path.is_relative_to(root) for root in roots)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and name.endswith(".py") else None


def _folder_of(module: ModuleType) -> Path | None:
    """The folder of a package without an ``__init__.py``."""
    places = list(getattr(module, "__dict__", {}).get("__path__", ()))  # anything may stand there
    return Path(places[0]).resolve() if places else None


def load_file(path: Path) -> ModuleType:
    """The module of a Python file, imported once for each state of the file.

    Raises:
        RecipeError: it is not there, or cannot be imported.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RecipeError(f"{path} is not there; files are relative to the recipe's folder")
    with importable(path.parent):
        free = path.stem.isidentifier() and path.stem not in sys.stdlib_module_names
        for name in (path.stem, f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"):
            if (there := sys.modules.get(name)) is not None and _file_of(there) == path:
                return there
            if there is None and (free or name != path.stem):
                return _execute(name, path)
    raise AssertionError(f"two files have the module name {name}")


def _execute(name: str, path: Path) -> ModuleType:
    loader = _Source(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with calling(f"importing {path}", path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import(name: str, folder: Path) -> ModuleType:
    with calling(f"importing {name!r}", folder):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # one that it imports
                raise
            near = difflib.get_close_matches(name, [*READERS, TEXT_READER], 1, 0.75)
            hint = f"; or did you mean the reader '{near[0]}:'?" if near else ""
            raise RecipeError(
                f"module {name!r} is not there: neither in the recipe's folder, {folder}, nor "
                f"installed; for a file, write file.py:function{hint}"
            ) from error


@contextmanager
def calling(what: str, folder: Path) -> Generator[None]:
    """A context for a user's code: its errors say what was called, and where it failed.

    Raises:
        RecipeError: the code raised an exception.
    """
    with told(what, folder), importable(folder):
        yield


@contextmanager
def told(what: str, folder: Path) -> Generator[None]:
    """As :func:`calling`, for what is called often: nothing is imported again.

    Raises:
        RecipeError: the code raised an exception.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        where = _where(error, folder)
        raise RecipeError(f"{what} raised {type(error).__name__}: {error}{where}") from error


def _where(error: Exception, folder: Path) -> str:
    """The last line of the user's own files in a traceback."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _inside(Path(frame.filename).resolve(), [str(folder.resolve())]):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def accepted(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function has parameters for, by name.

    Example:
        >>> accepted(lambda x, rank=3: None, {"rank": 8, "alpha": 16.0})
        {'rank': 8}
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    passing = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name for name, one in parameters.items() if one.kind not in passing}
    return {name: value for name, value in options.items() if name in named}


def check_options(function: Any, options: Mapping[str, Any], what: str, more: int = 0) -> None:
    """Refuse options that a function has no parameter for, and the lack of those it requires.

    Args:
        function: any callable.
        options: keyword arguments.
        what: the function and where its options are given, in words.
        more: the number of positional arguments that it gets besides.

    Raises:
        RecipeError: the function cannot be called with them.
    """
    if not callable(function):
        raise RecipeError(f"{what} must be a function or class, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*[None] * more, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in signature.parameters]
        near = (
            difflib.get_close_matches(unknown[0], signature.parameters, 1, 0.5) if unknown else []
        )
        hint = f"; did you mean {near[0]!r}?" if near else f"; its signature is {signature}"
        raise RecipeError(f"{what} cannot be called: {error}{hint}") from None


def reference_to(value: Any, folder: Path) -> str:
    """The reference that names a function or class, so that a resumed run finds it again.

    Raises:
        RecipeError: it has no name in a module: a lambda, a partial, a function in a function.
    """
    name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", "") or ""
    path = _file_of(sys.modules[module]) if module in sys.modules else None
    inside = path is not None and _inside(path, [str(folder.resolve())])
    in_package = "." in module  # which may have relative imports
    place = path.relative_to(folder.resolve()).as_posix() if path and inside else module
    place = module if in_package else place
    if (module == "__main__" and path is None) or not is_reference(f"{place}:{name}"):
        raise RecipeError(_unnamed(value))
    if load_object(f"{place}:{name}", folder) is not value:
        raise RecipeError(_unnamed(value))
    return f"{place}:{name}"


def _unnamed(value: Any) -> str:
    return (
        f"{value!r} cannot be named again by a run that is resumed: define it by def or class at "
        "the top of a file; options go into model_options, data_options or optimizer_options"
    )


def source_digests(references: Iterable[str], folder: Path) -> dict[str, str]:
    """The SHA-256 of the files that own code is in, and of those of the same folder they import.

    Installed packages are left out: the versions of those are recorded with a run. So are modules
    that are imported by computed names.

    Args:
        references: the references of a recipe; they are loaded.
        folder: the recipe's folder.
    """
    found: dict[Path, str] = {}
    root = folder.resolve()
    for reference in references:
        place = reference.rpartition(":")[0]
        load_object(reference, folder)
        module = load_file(folder / place) if place.endswith(".py") else _import(place, folder)
        path = _file_of(module)
        if path is not None and not _INSTALLED & set(path.parts) and not _standard(path):
            _collect(path, {root, path.parent, package_root(module, path)}, found)
    named = {Path(os.path.relpath(path, root)).as_posix(): found[path] for path in found}
    return dict(sorted(named.items()))


def _standard(path: Path) -> bool:
    return path.is_relative_to(Path(hashlib.__file__).resolve().parent)


def package_root(module: ModuleType, path: Path) -> Path:
    """The folder that holds the package of a module."""
    depth = module.__name__.count(".") + (path.name == "__init__.py")
    return path.parents[min(depth, len(path.parents) - 1)]


def _collect(path: Path, roots: set[Path], found: dict[Path, str]) -> None:
    if path in found:
        return
    data = path.read_bytes()
    found[path] = hashlib.sha256(data).hexdigest()
    for name in _imports(ast.parse(data), path, roots):
        _collect(name, roots, found)


def _imports(tree: ast.Module, path: Path, roots: set[Path]) -> Iterator[Path]:
    """The files below the roots that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f for one in node.names for f in _files(one.name, roots))
        elif isinstance(node, ast.ImportFrom):
            places = {path.parents[node.level - 1]} if node.level else roots
            module = node.module or ""
            for one in node.names:
                yield from _files(f"{module}.{one.name}".lstrip("."), places)


def _files(dotted: str, roots: set[Path]) -> Iterator[Path]:
    """The files of a module and of the packages above it; the last part may be a name in it."""
    parts = dotted.split(".")
    for root in roots:
        for end in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:end])
            for path in (place / "__init__.py", place.with_suffix(".py")):
                if path.is_file() and not _INSTALLED & set(path.parts):
                    yield path.resolve()
