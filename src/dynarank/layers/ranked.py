"""A module whose weights are each ``base + scale * join(factors)``, in any of the three forms.

A ranked layer is the user's own module with another class: ``module.__class__`` and its parameters
change, the object stays. So hooks, names, references held elsewhere and modules shared by several
parents all survive a change of form, and the root of a model can change form too. The classes are
ordinary module-level ones, hence copying, pickling and ``isinstance(layer, nn.Linear)`` work; those
of users' subclasses are made when needed, and pickled as what they are made from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from dynarank.decompositions import Geometry
from dynarank.decompositions.geometry import apply, linear_map
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.effective_weight import EffectiveWeight, hand_out, is_written
from dynarank.layers.execution import Call, Execution, choose_execution
from dynarank.layers.form_entry import KEY, SavedForm, from_tensor, read_notes, to_tensor, to_text
from dynarank.layers.merged import Merging, merged_product
from dynarank.layers.own_forward import set_class
from dynarank.layers.tracing import input_shape, is_static
from dynarank.layers.transforms import is_transformed
from dynarank.layers.weight import ResolvedWeight, WeightSpec

__all__ = [
    "RankedLayer",
    "copied_layers",
    "effective",
    "in_base_dtype",
    "one_call",
    "own_parameters",
    "read_parameters",
]

_REMEMBERED = 256  # shapes of inputs
_RESOLVED = ("_weights", "_executions")  # what follows from the forms
_FULL = FullRank()
_OWN = (
    "_forms",
    "_last_factored_forms",
    "_frozen_factors",
    "_factor_norms",
    "_made_by",
    "_specs",
    *_RESOLVED,
)
# Torch's fused transformer layer only reads weights, and would not run on a subclass of Tensor.
_ONLY_READS = "torch.nn.modules.transformer"


_COPIES: WeakSet[RankedLayer] = WeakSet()


def copied_layers() -> list[tuple[RankedLayer, Mapping[str, str]]]:
    """The ranked layers that were copied or unpickled, as those of averages, and what made them."""
    alive = list(filter(RankedLayer.__instancecheck__, _COPIES))  # the others were made plain
    return list(zip(alive, map(attrgetter("_made_by"), alive), strict=True))


class RankedLayer(nn.Module):
    """The base class of ranked layers; each derives from it first and from its plain class second.

    Its parameters, and so its ``state_dict`` keys, are those of the plain layer, except that a
    low-rank weight is replaced by its factors (``down``, ``up``), and an adapted one by ``base``
    and its factors; the state of a layer with factors also says of which forms it is
    (``saved_forms``). The effective weight can be read under its own name in every form.

    To add a layer, set ``plain``, write ``specs`` and ``forward`` (and ``calls``, if it is not one
    multiplication of the first argument), and pass both classes to
    :func:`dynarank.layers.register_layer`. See ``examples/06_custom_layer.py``.
    """

    plain: ClassVar[type[nn.Module]]
    _forms: dict[str, Form]
    _last_factored_forms: dict[str, LowRank | Adapted]
    _frozen_factors: dict[str, frozenset[str]]  # those that were frozen while others trained
    _factor_norms: dict[str, tuple[float, ...]]  # when a change made them
    _made_by: dict[str, str]  # the change that made the factors; "": unknown
    _specs: dict[str, WeightSpec]  # those of the plain layer
    _weights: dict[str, ResolvedWeight]
    _executions: dict[object, Execution]  # chosen so far

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The weights of ``module``, which is of the plain class; it may read their shapes."""
        raise NotImplementedError

    @classmethod
    def weights_of(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The weights of ``module``, which is of the plain class or of this one."""
        if isinstance(module, RankedLayer):
            return tuple(module._specs.values())
        return cls.specs(module)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str:
        """Why a module of the plain class would be handled wrongly; empty if it would not."""
        return ""

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """How a forward pass with these arguments, by name, uses each weight.

        Also the weights of ``fused_children``, under ``child.name``. By default the first argument
        is multiplied by the only weight.
        """
        (spec,), x = cls.weights_of(module), cast(Tensor, next(iter(inputs.values())))
        return {spec.name: [one_call(module, x, spec.geometry)]}

    @classmethod
    def fused_children(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """Children whose weights the plain forward pass reads itself, without calling the child.

        The module becomes ranked when one of them does, and calls them from then on.
        """
        return ()

    @classmethod
    def from_plain(cls, module: nn.Module) -> RankedLayer:
        """Make a module of the plain class one of this class, in place, every weight full-rank.

        A module that is ranked already stays as it is.
        """
        if not isinstance(module, RankedLayer):
            specs = {spec.name: spec for spec in cls.specs(module)}
            set_class(module, cls)
            assert isinstance(module, RankedLayer)
            module._forms = dict.fromkeys(specs, FullRank())
            module._last_factored_forms, module._frozen_factors = {}, {}
            module._factor_norms, module._made_by = {}, {}
            module._specs = specs
            module.form_changed()
        return module

    def to_plain(self) -> nn.Module:
        """Make it a module of the plain class again, in place; every weight must be full-rank."""
        if factored := {n: f for n, f in self.forms.items() if not isinstance(f, FullRank)}:
            raise ValueError(
                f"only a layer of full rank can be made plain, this one has {factored}; "
                "dr.merge(layer) inflates it first"
            )
        for name in _OWN:
            del self.__dict__[name]
        set_class(self, _plain_class(self))
        return self

    def plain_chain(self) -> nn.Sequential | None:
        """Plain modules that do in a row what this layer does; None: only the merged layer does.

        For :func:`dynarank.to_plain`, which asks layers whose every weight is low-rank. They take
        over the layer's parameters, and hold no others.
        """
        return None

    def plain_like(self) -> nn.Module:
        """A module of the plain class with the same attributes, its parameters' table included."""
        shell = self.plain.__new__(self.plain)
        shell.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _OWN})
        return shell

    def set_form(
        self,
        name: str,
        form: Form,
        frozen: frozenset[str] = frozenset(),
        norms: tuple[float, ...] = (),
        made_by: str = "",
    ) -> None:
        """Record that a weight has this form; its parameters have been replaced already.

        ``frozen``: the factors that stay frozen when they come back; ``norms``: of new factors;
        ``made_by``: the name of the change that made them.
        """
        for factored in (self._forms[name], form):
            if not isinstance(factored, FullRank):
                self.remember(name, factored)
        self._forms = {**self._forms, name: form}
        self._frozen_factors = {**self._frozen_factors, name: frozen}
        self._factor_norms = {**self._factor_norms, name: norms}
        self._made_by = {**self._made_by, name: made_by}
        self.form_changed()

    def remember(self, name: str, form: LowRank | Adapted | None) -> None:
        """Record the last form with factors that a weight had; None: it had none."""
        others = {n: known for n, known in self._last_factored_forms.items() if n != name}
        self._last_factored_forms = others if form is None else {**others, name: form}

    def form_changed(self) -> None:
        """Look up what follows from the forms; called when one has changed."""
        self._weights = {n: spec.resolved(self.forms[n]) for n, spec in self._specs.items()}
        self._executions = {}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _RESOLVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.form_changed()
        _COPIES.add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self.has_factors(name):
            super().__setattr__(name, value)
        elif isinstance(value, Parameter):
            self.register_parameter(name, value)
        elif not is_written(value, self, name):  # as it is after `layer.weight *= 2`
            raise TypeError(f"cannot assign to {name!r}: {_with_factors(self, name)}")

    def __delattr__(self, name: str) -> None:
        if self.has_factors(name):
            raise TypeError(f"cannot delete {name!r}: {_with_factors(self, name)}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """As of any module; the effective weight of one with factors is no parameter."""
        if isinstance(param, EffectiveWeight):
            source = param.reading
            reason = _with_factors(source.layer, source.name)
            raise TypeError(f"cannot register {name!r}: {reason}")
        if self.has_factors(name):
            raise KeyError(f"attribute {name!r} already exists: {_with_factors(self, name)}")
        super().register_parameter(name, param)

    @property
    def forms(self) -> Mapping[str, Form]:
        """The form of each weight, by its name; a new table after each change."""
        return self._forms

    @property
    def last_factored_forms(self) -> Mapping[str, LowRank | Adapted]:
        """The last form with factors of each weight that had one: for deflate without a rank."""
        return self._last_factored_forms

    @property
    def frozen_factors(self) -> Mapping[str, frozenset[str]]:
        """The factors of each weight that are frozen while others train, or were when last seen."""
        return {name: self._frozen(weight) for name, weight in self._weights.items()}

    @property
    def factor_norms(self) -> Mapping[str, tuple[float, ...]]:
        """The norms that the factors of each weight had when a change made them."""
        return self._factor_norms

    @property
    def made_by(self) -> Mapping[str, str]:
        """The change that made the factors of each weight: the same in a copy; empty if loaded."""
        return self._made_by

    @property
    def saved_forms(self) -> Tensor | None:
        """The entry of a state that says of which forms it is; None if every weight is full-rank.

        Nothing happens when it is set, as ``torch.func.functional_call(model, state)`` does.
        """
        return to_tensor(self._saved()) if any(map(self.has_factors, self._forms)) else None

    @saved_forms.setter
    def saved_forms(self, value: object) -> None:
        pass

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse: ``torch.jit.script`` asks each module for what it is to compile."""
        raise ValueError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.export or "
            "torch.jit.trace, or make a copy of the model plain first, "
            "`dr.merge(copy.deepcopy(model))`"
        )

    @property
    def form(self) -> Form:
        """The form of the layer's only weight."""
        if "weight" not in self._forms:  # hasattr must be able to ask
            raise AttributeError(f"{type(self).__name__} has several weights: read its forms")
        return self._forms["weight"]

    def has_factors(self, name: str) -> bool:
        """Whether this is the name of a weight that is low-rank or adapted."""
        return not isinstance(self.__dict__.get("_forms", {}).get(name, _FULL), FullRank)

    def resolved(self, name: str = "weight") -> ResolvedWeight:
        """The weight of this name in its form."""
        return self._weights[name]

    def effective_weight(self, name: str = "weight") -> Tensor:
        """The parameter itself if full-rank, else ``base + scale * join(factors)``."""
        if not self.has_factors(name):
            return cast(Tensor, getattr(self, name))
        return self._weights[name].effective(read_parameters(self))

    def multiply(
        self,
        weight: ResolvedWeight,
        x: Tensor,
        bias: Tensor | None = None,
        geometry: Geometry | None = None,
    ) -> Tensor:
        """``x`` times the effective weight plus bias, executed as the form says.

        Args:
            weight: one of the layer's, from :meth:`resolved`.
            x: (..., in) or (batch, in, *positions), padded already if the layer pads by a mode.
            bias: (out,) or None.
            geometry: how the weight slides over ``x``; None: as its spec says.
        """
        form, spec = weight.form, weight.spec
        geometry = spec.geometry if geometry is None else geometry
        if isinstance(form, FullRank):  # the attribute, which torch.nn.utils may have replaced
            base = weight.base({spec.name: getattr(self, spec.name)})
            return linear_map(x, spec.to_canonical(base), geometry, bias)
        parameters = in_base_dtype(weight, read_parameters(self))
        execution = self._execution(weight, x, geometry, parameters[weight.names[-1]])
        if execution.name == "joined":
            return linear_map(x, weight.joined(parameters), geometry, bias)
        if execution.name == "factored":
            return _chain(weight, parameters, x, geometry, bias)
        base, stages = spec.to_canonical(weight.base(parameters)), weight.stages(geometry)
        if execution.name == "two-branch":
            whole = linear_map(x, base, geometry, bias)
            return whole + _chain(weight, parameters, x, geometry, None)
        assert isinstance(form, Adapted) and weight.decomposition is not None, execution
        thin, keep = execution.thin, execution.keep
        how = Merging(weight.decomposition, form.scale, geometry, stages, thin, keep)
        return merged_product(x, base, weight.factors(parameters), bias, how)

    def _execution(
        self, weight: ResolvedWeight, x: Tensor, geometry: Geometry, last: Tensor
    ) -> Execution:
        grad = torch.is_grad_enabled()
        trains = grad and last.requires_grad
        input_grad = grad and x.requires_grad
        key = None
        if is_static(x.shape):  # the usual case, before anything is built
            key = (weight.spec.name, weight.spec.shape, x.shape, input_grad, trains)
            if (known := self._executions.get(key)) is not None:
                return known
        call = Call(input_shape(x), geometry, input_grad, trains)
        return self.execution(weight, call, key)

    def execution(self, weight: ResolvedWeight, call: Call, key: object = None) -> Execution:
        """How ``call`` is computed; remembered by the key, or else by the weight and the call."""
        if not is_static(call.shape):
            return choose_execution(weight.spec, weight.form, call)
        key = key or (weight.spec.name, weight.spec.shape, call)
        if (chosen := self._executions.get(key)) is None:
            if len(self._executions) >= _REMEMBERED:
                self._executions.clear()
            chosen = choose_execution(weight.spec, weight.form, call)
            self._executions[key] = chosen
        return chosen

    @torch.no_grad()
    def set_weight_(self, name: str, value: Tensor) -> None:
        """Give a weight this value in the form it has: truncated if low-rank, the base if adapted.

        Args:
            name: the weight's.
            value: as the module stores it.
        """
        self._weights[name].write_(cast(dict[str, Tensor], self._parameters), value)

    def _frozen(self, weight: ResolvedWeight) -> frozenset[str]:
        own, known = self._parameters, self._frozen_factors.get(weight.spec.name, frozenset())
        found = {n: p for n in weight.names if (p := own.get(n)) is not None}
        trains = {n: p.requires_grad for n, p in found.items() if not weight.spec.is_base(n)}
        if not any(trains.values()):
            return known
        return (known | trains.keys()) - {name for name, does in trains.items() if does}

    def _saved(self) -> dict[str, SavedForm]:
        last, norms = self._last_factored_forms, self._factor_norms
        return {
            name: SavedForm(
                form=weight.form,
                last=last.get(name) if isinstance(weight.form, FullRank) else None,
                frozen=self._frozen(weight),
                norms=norms.get(name, ()),
            )
            for name, weight in self._weights.items()
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As torch's, with what the tensors do not tell: as an entry, if there are factors.

        If there are none, the keys are the plain layer's: it is written to the state's metadata, of
        this module and of those around it, since a part of a state is loaded with its own only.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (entry := self.saved_forms) is not None:
            destination[prefix + KEY] = entry
            return
        metadata: Mapping[str, dict[str, Any]] = getattr(destination, "_metadata", {})
        parts, note = prefix.split(".")[:-1], to_text(self._saved())
        for i in range(len(parts) + 1):
            if (around := metadata.get(".".join(parts[:i]))) is not None:
                around.setdefault(KEY, {})[".".join(parts[i:])] = note

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch's, but a state of another form is an error even if not ``strict``."""
        args = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + KEY in unexpected_keys:
            unexpected_keys.remove(prefix + KEY)
        held = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        try:
            self._check_held([name for name in held if name != KEY])
            entry = state_dict.get(prefix + KEY)
            saved = read_notes(local_metadata).get("", {}) if entry is None else from_tensor(entry)
            self.adopt({name: one for name, one in saved.items() if self._holds(name, held)})
        except ValueError as error:
            error_msgs.append(
                f"layer {prefix.rstrip('.')!r}: {error}. Load the state into the whole model "
                "(model.load_state_dict brings it to the saved forms), load the rank scheduler's "
                "state first, or bring the model to those forms by apply_plan"
            )

    def _check_held(self, held: list[str]) -> None:
        """Raise ValueError for the names of a state of another form."""
        known, weights = [*self._parameters, *self._buffers], self._weights.values()
        foreign = [name for name in held if "." not in name and name not in known]
        if all(name in held for weight in weights for name in weight.names):  # then only a base
            foreign = [n for n in foreign if any(weight.spec.is_base(n) for weight in weights)]
        if foreign:
            raise ValueError(
                f"it has the parameters {', '.join(known)}, the state has {', '.join(foreign)}: it "
                "was saved in another form"
            )

    def _holds(self, name: str, held: list[str]) -> bool:
        """Whether a state of these names has all parameters of a weight."""
        return name in self._weights and {*self._weights[name].names} <= {*held}

    def adopt(self, saved: Mapping[str, SavedForm]) -> None:
        """Take over the forms of a state that has been loaded.

        Raises:
            ValueError: they are forms of other parameters.
        """
        for name, one in saved.items():
            spec, form = self._specs[name], self._specs[name].resolve(one.form)
            if not spec.same_parameters(self._forms[name], form):
                raise ValueError(
                    f"its {name} has the form {self._forms[name]}, the state's has {form}"
                )
        own = self._saved()
        for name, one in saved.items():
            if one == own[name]:
                continue
            self.set_form(name, one.form, one.frozen, one.norms)
            if isinstance(one.form, FullRank):
                self.remember(name, one.last)

    def extra_repr(self) -> str:
        """The plain layer's, and the forms."""
        shown = ", ".join(
            f"form={form}" if name == "weight" else f"{name}={form}"
            for name, form in self.forms.items()
        )
        return ", ".join(filter(None, (super().extra_repr(), shown)))


class effective:
    """An attribute of a ranked class: the layer's effective weight, in every form.

    A full-rank weight is the parameter, or what ``torch.nn.utils`` have put in its place. Any other
    is computed when it is read. What is written to it under ``torch.no_grad()`` goes to the layer:
    to the base of an adapted weight, whose adapter's output becomes zero; to the factors of a
    low-rank weight, truncated to the rank if all values are replaced. A change of a low-rank weight
    (``+=``, ``[0] =``, ``.data =``) that its rank does not hold is a ValueError.

    Example:
        >>> layer = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)[0]
        >>> _ = nn.init.ones_(layer.weight)
        >>> torch.allclose(layer(torch.ones(8)), 8 + layer.bias)
        True
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: RankedLayer | None, owner: type) -> Any:
        if layer is None:
            return self
        if not layer.has_factors(self.name):
            return nn.Module.__getattr__(layer, self.name)
        return read_out(layer, self.name)


def _with_factors(layer: Any, name: str) -> str:
    return (
        f"in the form {layer.forms[name]} the weight is computed from factors. Write its values "
        f"under torch.no_grad() (layer.{name}.copy_(value)), or call inflate(model) first"
    )


def read_out(layer: RankedLayer, name: str) -> Tensor:
    """The effective weight for the caller's caller: what it writes to it reaches the layer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return layer.effective_weight(name)
    if cast(Any, sys)._getframe(2).f_globals.get("__name__") == _ONLY_READS:
        return layer.effective_weight(name)
    if torch.is_inference_mode_enabled():  # an inference tensor has no version counter
        with torch.inference_mode(False), torch.no_grad():
            return hand_out(layer, layer.resolved(name), layer.effective_weight(name))
    return hand_out(layer, layer.resolved(name), layer.effective_weight(name))


def _plain_class(layer: RankedLayer) -> type[nn.Module]:
    """The plain class, with what ``torch.nn.utils.parametrize`` has added to the layer's."""
    if not is_parametrized(layer):
        return layer.plain
    plain, added = layer.plain, dict(vars(type(layer)))
    for name in ("__dict__", "__weakref__"):
        added.pop(name, None)
    return type(f"Parametrized{plain.__name__}", (plain,), added)


def own_parameters(module: nn.Module) -> dict[str, Parameter | None]:
    """The module's own table of parameters: what is written here changes the module."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def read_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """The module's parameters by name, to read; a replica has tensors as attributes instead."""
    if "_is_replica" in module.__dict__:
        return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return cast(dict[str, Tensor], own_parameters(module))


def one_call(module: nn.Module, x: Tensor, geometry: Geometry) -> Call:
    """One multiplication of ``x`` by the only weight of a module."""
    own = cast(Mapping[str, "Tensor | None"], read_parameters(module)).items()
    trains = any(p is not None and p.requires_grad and name != "bias" for name, p in own)
    return Call(input_shape(x), geometry, x.requires_grad, trains)


def in_base_dtype(weight: ResolvedWeight, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parameters; an adapter of another dtype, as fp32 on a bf16 base, is cast to the base's.

    Autocast casts both itself.
    """
    base, dtype = parameters[weight.names[0]], parameters[weight.names[-1]].dtype
    if dtype == base.dtype or not isinstance(weight.form, Adapted):
        return parameters
    if torch.is_autocast_enabled(base.device.type):
        return parameters
    return {**parameters, **{n: parameters[n].to(base.dtype) for n in weight.names[1:]}}


def _chain(
    weight: ResolvedWeight,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    geometry: Geometry,
    bias: Tensor | None,
) -> Tensor:
    """The factors one after another; an adapter's are scaled."""
    form, factors, stages = weight.form, weight.factors(parameters), weight.stages(geometry)
    assert not isinstance(form, FullRank)
    if isinstance(form, Adapted):
        *first, last = factors
        factors = (*first, last * form.scale)  # cheaper than scaling the output
    if form.recompute and torch.is_grad_enabled() and not is_transformed():
        return checkpoint(apply, x, factors, stages, bias, use_reentrant=False)  # type: ignore[no-any-return]
    return apply(x, factors, stages, bias)
