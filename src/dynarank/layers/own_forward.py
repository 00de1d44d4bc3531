"""A ``forward`` that was set on a module itself, not on its class, when the class changes.

``module.forward = wrap(module.forward)`` (accelerate's hooks, checkpoint wrappers, decorators,
lambdas) keeps a bound method of the class that the module had, so without more it would go on with
that class's forward pass. :func:`set_class` binds such methods to the new class wherever they are
kept: closures, default arguments, partials, attributes of callables and of the module
(``_old_forward``). A wrapper that calls the forward pass in another way is found beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

from torch import nn

from dynarank.distributed.unit_class import above

__all__ = ["forward_obstacle", "set_class"]


def forward_obstacle(module: nn.Module) -> str:
    """Why the module's own ``forward`` would not follow a change of class; empty if it would.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> double, layer.forward = layer.forward, lambda x: 2 * double(x)
        >>> forward_obstacle(layer).partition(",")[0]
        'its own forward (<lambda>'
    """
    own = vars(module).get("forward")
    if own is None:
        return ""
    walk = _Rebinding(module, type(module), type(module))
    walk.visit(own)
    if walk.reached and not walk.stuck:
        return ""
    name, kind = getattr(own, "__name__", type(own).__name__), type(module).__name__
    return (
        f"its own forward ({name}, set on the module itself) does not call {kind}.forward by a "
        "bound method in its closure, defaults or attributes, so it would not follow the change: "
        "set it after the change, or remove it first (`del module.forward`; accelerate: "
        "remove_hook_from_module)"
    )


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, and the methods it has captured too; undone by its inverse.

    A module that ``fully_shard`` was called on stays a unit: the class beneath changes.
    """
    kind = above(type(module), kind)
    walk, own = _Rebinding(module, type(module), kind), vars(module)
    object.__setattr__(module, "__class__", kind)  # whatever the class does when it is set
    walk.visit_all(own, [name for name, value in own.items() if callable(value)])
    for attributes in walk.unused:  # the list grows
        walk.visit_all(attributes, list(attributes))


class _Rebinding:
    """A walk through what a callable calls that binds methods of ``module`` to another class.

    Args:
        module: the module.
        before: the class whose methods are looked for.
        after: the class whose methods replace them.

    Attributes:
        reached: whether the class's forward pass is called, by a method that can be replaced.
        stuck: whether it is called by a function that other modules may share.
        unused: attributes that describe a function (``__wrapped__``) and are not called by it.
    """

    def __init__(self, module: nn.Module, before: type[nn.Module], after: type[nn.Module]) -> None:
        self.module, self.before, self.after = module, before, after
        self.reached = self.stuck = False
        self.unused: list[dict[str, Any]] = []
        self._seen: dict[int, tuple[Any, Any]] = {}  # by identity: the value, and what replaces it

    def visit(self, value: Any) -> Any:
        """What is to be held in place of ``value``."""
        if id(value) not in self._seen:
            self._seen[id(value)] = value, value  # in case it refers to itself
            self._seen[id(value)] = value, self._visit(value)
        return self._seen[id(value)][1]

    def visit_all(self, table: dict[str, Any], names: list[str]) -> None:
        """Visit these entries of a table, and replace those that change."""
        for name in names:
            if (new := self.visit(table[name])) is not table[name]:
                table[name] = new

    def _visit(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            return self._method(value)
        if isinstance(value, partial):
            return self._partial(cast("partial[Any]", value))
        if value is self.before.forward:
            self.stuck = True
        elif isinstance(value, FunctionType):
            self._function(value)
        elif callable(value) and not isinstance(value, type | nn.Module):
            self._object(value)
        return value

    def _object(self, value: object) -> None:
        attributes = getattr(value, "__dict__", {})
        self.visit_all(attributes, [name for name in attributes if name != "__wrapped__"])

    def _method(self, method: MethodType) -> MethodType:
        function, owner = method.__func__, method.__self__
        if owner is not self.module:  # of an object that wraps; another module has its own forward
            if not isinstance(owner, nn.Module):
                self.visit(function)
                self._object(owner)
            return method
        name = getattr(function, "__name__", "")
        if getattr(self.before, name, None) is function:
            self.reached |= name == "forward"
            new = getattr(self.after, name, function)
        else:
            new = self.visit(function)
        return method if new is function else MethodType(new, owner)

    def _partial(self, call: partial[Any]) -> partial[Any]:
        parts = (call.func, *call.args, *call.keywords.values())
        func, *rest = new = [self._argument(part) for part in parts]
        self.unused.append(vars(call))
        if all(a is b for a, b in zip(parts, new, strict=True)):
            return call
        args, named = rest[: len(call.args)], rest[len(call.args) :]
        made = partial(func, *args, **dict(zip(call.keywords, named, strict=True)))
        vars(made).update(vars(call))
        self.unused.append(vars(made))
        return made

    def _argument(self, value: Any) -> Any:
        """As :meth:`visit`; here an unbound forward function can be replaced, too."""
        if value is not self.before.forward:
            return self.visit(value)
        self.reached = True
        return self.after.forward

    def _function(self, function: FunctionType) -> None:
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # nothing in it yet
                continue
            if (new := self.visit(held)) is not held:
                cell.cell_contents = new
        defaults = function.__defaults__ or ()
        new_defaults = tuple(map(self.visit, defaults))
        if any(a is not b for a, b in zip(defaults, new_defaults, strict=True)):
            function.__defaults__ = new_defaults
        named = function.__kwdefaults__ or {}
        self.visit_all(named, list(named))
        for name in set(_names(function.__code__)) & vars(self.module).keys():
            self.visit(vars(self.module)[name])
        self.unused.append(vars(function))


def _names(code: CodeType) -> Iterator[str]:
    """The names of attributes that a function, or one inside it, may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
