"""Folders of ranked models that ``save_pretrained`` writes and ``from_pretrained`` rebuilds.

The forms are written into ``config.json`` as a quantization of the method "dynarank", whose
quantizer gives the empty model these forms before transformers loads the weights. A loaded model is
an ordinary one again, without a quantizer.

A process that has not imported this would load such a folder with random values in place of all
weights that have factors: transformers skips an unknown quantization with a message in the log. So
the config also asks for a fusion that only this module takes back, without which loading is a
ValueError that names this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynarank.forms import Adapted, LowRank
from dynarank.layers import RankedLayer
from dynarank.layers.form_entry import KEY, SavedForm, from_tensor, read_notes, to_tensor
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.sites import survey

__all__ = ["RankedFolder", "RankedFolderLoader", "save_forms_with_models"]

METHOD = "dynarank"
_FORMAT = "save_original_format"  # an argument of save_pretrained
FILLED = "_is_hf_initialized"  # what transformers notes on a parameter that it has loaded
NEEDED = "dynarank (before from_pretrained, `import dynarank.integrations.transformers`)"


class RankedFolder(QuantizationConfigMixin):
    """What ``config.json`` says of a ranked model.

    Args:
        layers: the forms of each layer's weights, as plain data.
        dtype: that of the model.
        dtypes: those of the parameters that have another.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]],
        dtype: str = "",
        dtypes: Mapping[str, str] | None = None,
        **_: object,
    ) -> None:
        self.quant_method: Any = METHOD
        self.layers, self.dtype, self.dtypes = layers, dtype, dtypes or {}

    @classmethod
    def of(cls, model: Any, state: Mapping[str, Any]) -> RankedFolder | None:
        """That of a model with this state; None if no weight has factors."""
        entries = {key: value for key, value in state.items() if key.rpartition(".")[2] == KEY}
        found = {key.rpartition(".")[0]: from_tensor(value) for key, value in entries.items()}
        saved = [one for layer in found.values() for one in layer.values()]
        if not any(isinstance(one.form, LowRank | Adapted) for one in saved):
            return None
        notes = read_notes(getattr(state, "_metadata", {}).get("", {}))
        layers = {path: layer for path, layer in {**notes, **found}.items() if layer}
        data = {
            path: {n: one.to_data() for n, one in layer.items()} for path, layer in layers.items()
        }
        floats = {n: t for n, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
        other = {n: _name(t.dtype) for n, t in floats.items() if t.dtype != model.dtype}
        return cls(data, _name(model.dtype), other)


class RankedFolderLoader(HfQuantizer):
    """Brings a model that ``from_pretrained`` is loading to the forms of the folder."""

    quantization_config: RankedFolder

    def is_serializable(self) -> Any:
        """Never asked: a loaded model has no quantizer."""
        return True

    @property
    def is_trainable(self) -> Any:
        """It trains."""
        return True

    @property
    def is_qat_trainable(self) -> Any:
        """All of it."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Take back the fusion that stands for this module."""
        left = {name: how for name, how in config.fusion_config.items() if name != NEEDED}
        config.fusion_config = left
        if not left:
            del config.fusion_config
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        """Bring the model, whose parameters have no values yet, to the forms of the folder."""
        folder = self.quantization_config
        self._layers = _located(model, folder.layers)
        dtypes = folder.dtypes if _name(model.dtype) == folder.dtype else {}
        follow_loads(model)
        layers = _with_tied(model, self._layers)
        model.load_state_dict(_without_values(model, layers, dtypes), strict=False)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        # Tying factor by factor, transformers would look at a weight of which some have no values.
        model._adjust_bias = _leave_bias
        # The entries are no parameters: transformers is to look for none, and to ignore those.
        self._hook = model.register_state_dict_post_hook(_without_entries)
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.){KEY}$"}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Leave an ordinary model with ranked layers, whose bases are frozen."""
        self._hook.remove()
        del model._adjust_bias
        del model._keys_to_ignore_on_load_unexpected, model.hf_quantizer
        del model.is_quantized, model.quantization_method, model.config.quantization_config
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        _check_loaded(model, self._layers)
        _freeze(model, self._layers)


def _freeze(model: nn.Module, layers: Mapping[str, Mapping[str, SavedForm]]) -> None:
    """Freeze the bases, and the factors that were frozen: transformers has let all train."""
    for path, saved in layers.items():
        layer = cast(RankedLayer, model.get_submodule(path))
        for name, one in saved.items():
            weight = layer.resolved(name)
            for own in weight.names:
                if weight.spec.is_base(own) or own in one.frozen:
                    layer.get_parameter(own).requires_grad_(False)


def save_forms_with_models() -> None:
    """From now on ``save_pretrained`` writes the forms of a ranked model too."""
    plain = PreTrainedModel.save_pretrained
    arguments = inspect.signature(plain)

    @wraps(plain)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(self, *args, **kwargs).arguments
        state = given.get("state_dict")
        state = self.state_dict() if state is None else state
        folder = RankedFolder.of(self, state)
        # Files of older versions have other names and layouts, which transformers knows of whole
        # weights only; and the Trainer loads its checkpoints by the model's own names.
        if folder is not None or KEY in state:
            kwargs |= {} if _FORMAT in given else {_FORMAT: False}
        with _in_config(self.config, folder):
            return plain(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained


@contextmanager
def _in_config(config: Any, folder: RankedFolder | None) -> Generator[None]:
    """Write the forms into the config, in place of those of a folder that it was read from."""
    own = getattr(config, "quantization_config", None)
    stale = isinstance(own, Mapping) and own.get("quant_method") == METHOD
    if folder is None and not stale:
        yield
        return
    if own is not None and not stale:
        raise ValueError(
            f"the model is quantized ({own}) and has layers with factors: "
            "config.json can say one of both; dr.merge(model) first"
        )
    names = "fusion_config", "quantization_config"
    before = {name: vars(config).pop(name) for name in names if name in vars(config)}
    fusions = {n: how for n, how in (before.get(names[0]) or {}).items() if n != NEEDED}
    try:
        if folder is not None:
            config.quantization_config, fusions[NEEDED] = folder, True
        if fusions:
            config.fusion_config = fusions
        yield
    finally:
        for name in names:
            vars(config).pop(name, None)
        for name, value in before.items():
            setattr(config, name, value)


def _located(model: Any, layers: Mapping[str, Any]) -> dict[str, dict[str, SavedForm]]:
    """The folder's layers by their paths in this model, which may be its base or have another head.

    Raises:
        ValueError: it has none of them.
    """
    known, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    found: dict[str, dict[str, SavedForm]] = {}
    for path, data in layers.items():
        places = (path, path.removeprefix(prefix), prefix + path)
        at = next((place for place in places if place in known), None)
        if at is not None:
            found[at] = {name: SavedForm.from_data(one) for name, one in data.items()}
    if not found:
        raise ValueError(
            f"the folder's config.json has the forms of {', '.join(layers)}, and "
            f"{type(model).__name__} has no such layers: it is the folder of another model"
        )
    return found


def _with_tied(model: Any, layers: Mapping[str, Any]) -> dict[str, dict[str, SavedForm]]:
    """The layers and those that have a weight of them, also if the saved model had them not."""
    found = {path: dict(saved) for path, saved in layers.items()}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        (to, _, own), (at, _, name) = target.rpartition("."), source.rpartition(".")
        if name in found.get(at, {}):
            found.setdefault(to, {}).setdefault(own, found[at][name])
    return found


def _without_values(
    model: nn.Module, layers: Mapping[str, Mapping[str, SavedForm]], dtypes: Mapping[str, str]
) -> dict[str, Tensor]:
    """A state with these forms on the meta device."""
    state = {f"{path}.{KEY}".lstrip("."): to_tensor(saved) for path, saved in layers.items()}
    for site in survey(model):
        for path in site.module_paths:
            if (one := layers.get(path, {}).get(site.spec.name)) is None:
                continue
            dtype = next(iter(site.parameters().values())).dtype
            for name, shape in site.spec.parameter_shapes(site.spec.resolve(one.form)).items():
                key = f"{path}.{name}".lstrip(".")
                own = getattr(torch, dtypes[key]) if key in dtypes else dtype
                state[key] = torch.empty(shape, dtype=own, device="meta")
    return state


def _leave_bias(*_: object) -> None: ...


def _without_entries(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    for key in [key for key in state if key.rpartition(".")[2] == KEY]:
        del state[key]


def _check_loaded(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters of ranked layers that the folder had no values for."""
    parts = [(path, model.get_submodule(path).named_parameters(recurse=False)) for path in layers]
    named = [(f"{path}.{name}", parameter) for path, own in parts for name, parameter in own]
    missing = [name for name, one in named if not (hasattr(one, FILLED) or one.is_meta)]
    if missing:
        raise ValueError(
            f"the folder has no values for {', '.join(missing)}: its files are of different "
            "models, or one of them is missing, or the config asks for other sizes (num_labels): "
            "load the model as it was saved, and replace the layer then"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


register_quantization_config(METHOD)(RankedFolder)
register_quantizer(METHOD)(RankedFolderLoader)
