"""A digest of the source of what is added to the harness: an own problem, the functions of an arm.

It is of the statements that define a thing and of all that these use, in any file that is not
installed. Comments, docstrings and line breaks are not in it.
"""

from __future__ import annotations

import ast
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path
from types import FunctionType
from typing import Any

from benchmarks.training.harness.identity import digest

_OTHERS = ("dynarank", "benchmarks.training.harness", "benchmarks.training.problems")
"""What a record has the digest of anyway."""
_Place = tuple[str, str | None]
"""A module, and a name in it; None: all of it."""


@dataclass(frozen=True)
class _Statement:
    """A statement of a module.

    Args:
        text: without comments and docstrings.
        bound: the names that it gives a value.
        used: the names of its module that it uses.
        imports: what it imports.
    """

    text: str
    bound: frozenset[str]
    used: frozenset[str]
    imports: tuple[_Place, ...]


def source(*things: Any) -> str | None:
    """The digest of what these things add; None: they add nothing."""
    places = [place for thing in things for place in _places(thing)]
    seen, texts = set[_Place](), set[str]()
    while places:
        module, name = place = places.pop()
        if place in seen or not _is_own(module):
            continue
        seen.add(place)
        for one in _statements(Path(str(sys.modules[module].__file__)).read_bytes(), module):
            if name is None or name in one.bound:
                texts.add(one.text)
                places += [*((module, used) for used in one.used), *one.imports]
    return digest("\n".join(sorted(texts)).encode()) if texts else None


def _places(thing: Any) -> Iterator[_Place]:
    """Where the classes and functions are defined that a thing is made of."""
    for piece in _pieces(thing):
        if _is_own(module := str(piece.__module__)):
            name = piece.__qualname__.partition(".")[0]
            yield module, name if hasattr(sys.modules[module], name) else None


def _pieces(thing: Any) -> Iterator[Any]:
    if isinstance(thing, partial):
        for one in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _pieces(one)
    elif isinstance(thing, type):
        for cls in thing.__mro__:
            yield cls
            yield from (one for one in vars(cls).values() if isinstance(one, FunctionType))
    elif hasattr(thing, "__qualname__"):
        yield thing
    else:
        held = getattr(thing, "__dict__", {}).values()
        yield from _pieces(type(thing))
        yield from (one if hasattr(one, "__qualname__") else type(one) for one in held)


def _is_own(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    other = any(f"{module}.".startswith(f"{name}.") for name in _OTHERS)
    other |= module.partition(".")[0] in sys.stdlib_module_names
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return file.endswith(".py") and not other and not installed


@cache
def _statements(content: bytes, module: str) -> list[_Statement]:
    body = (one for node in ast.parse(content).body for one in _single(node))
    return [_statement(node, str(sys.modules[module].__package__)) for node in body]


def _single(node: ast.stmt) -> list[ast.stmt]:
    """A statement, or one for each name that it imports."""
    if isinstance(node, ast.Import):
        return [ast.Import([name]) for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [name], node.level) for name in node.names]
    return [node]


def _statement(node: ast.stmt, package: str) -> _Statement:
    table = symtable.symtable(ast.unparse(node), "", "exec")
    symbols = table.get_symbols()
    bound = {one.get_name() for one in symbols if one.is_assigned() or one.is_imported()}
    used = {one.get_name() for t in _scopes(table) for one in t.get_symbols() if one.is_global()}
    imports = tuple(place for one in ast.walk(node) for place in _imports(one, package))
    text = ast.unparse(_WithoutDocstrings().visit(ast.Module([node], [])))
    return _Statement(text, frozenset(bound), frozenset(used), imports)


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _imports(node: ast.AST, package: str) -> Iterator[_Place]:
    """What an import names; a name that is a module stands for all of it."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            yield (inner, None) if inner in sys.modules else (module, alias.name)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node
