"""PEFT's ``adapter_config.json``: the rank and alpha of each layer, and what cannot be taken over.

A pattern of PEFT's means every module whose name ends with a match of it. Those that are written
here mean one module each, whatever its name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dynarank.files.printable import printable

__all__ = ["MERGE", "Scaling", "check_config", "config_of", "dropout_of", "scaling_of"]

Scaling = tuple[int, float]  # rank, alpha
# Those that leave the base as it is, and so an adapter that is nothing but lora_B @ lora_A.
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")
_CONVERT = (
    "bring it into plain LoRA by PEFT's save_pretrained(path_initial_model_for_weight_conversion="
    "...), or merge it there (merge_and_unload) and give the model"
)
MERGE = "merge it into the model by PEFT (merge_and_unload), and give that model"
_DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "bias": "none",
    "init_lora_weights": True,
    "qalora_group_size": 16,
    "megatron_core": "megatron.core",
}
# How the layers were chosen and first filled, where it was written, which model it belongs to: the
# tensors say the rest.
_NO_MATTER = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision peft_version inference_mode "
    "r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out use_rslora init_lora_weights bias "
    "modules_to_save eva_config loftq_config runtime_config crc".split()
)


def config_of(
    layers: Mapping[str, Scaling], *, fan_in_fan_out: bool = False, **more: Any
) -> dict[str, Any]:
    """The configuration of an adapter whose layers have these ranks and alphas, by path.

    Example:
        >>> found = config_of({"0": (4, 16.0), "1": (2, 16.0)})
        >>> found["r"], found["lora_alpha"], list(found["rank_pattern"].values())
        (4, 16, [2])
    """
    rank, alpha = (_most_common(one[i] for one in layers.values()) for i in (0, 1))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": "|".join(map(re.escape, layers)),
        "rank_pattern": {_only(path): r for path, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {_only(path): _plain(a) for path, (_, a) in layers.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        **more,
    }


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter is not, in all its layers, ``alpha / r * lora_B @ lora_A``."""
    kind = str(config.get("peft_type", "none")).removeprefix("PeftType.")
    if kind != "LORA":
        raise ValueError(f"the adapter's peft_type is {kind}, only LORA can be taken over: {MERGE}")
    initial = config.get("init_lora_weights", True)
    if initial not in _INITIAL:
        raise ValueError(
            f"the adapter's init_lora_weights={initial!r} may change the base, which the folder "
            f"does not hold: {_CONVERT}"
        )
    if config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise ValueError(
            "the adapter's use_rslora=True beside rank_pattern or alpha_pattern cannot be taken "
            f"over: {MERGE}"
        )
    for key, value in config.items():
        if key not in _NO_MATTER and value and value != _DEFAULTS.get(key):
            raise ValueError(f"the adapter's {key}={_short(value)} cannot be taken over: {MERGE}")


def dropout_of(config: Mapping[str, Any]) -> float:
    """The dropout in front of the adapters."""
    return float(config.get("lora_dropout") or 0.0)


def scaling_of(config: Mapping[str, Any], path: str) -> Scaling:
    """The rank and alpha of a layer, as PEFT finds them; alpha such that alpha / rank is the scale.

    Example:
        >>> scaling_of({"r": 4, "lora_alpha": 8, "rank_pattern": {"fc": 2}}, "block.fc")
        (2, 8.0)
        >>> scaling_of({"r": 4, "lora_alpha": 8, "use_rslora": True}, "fc")
        (4, 16.0)
    """
    rank = _matched(config.get("rank_pattern") or {}, path, config.get("r", _DEFAULTS["r"]))
    default = config.get("lora_alpha", _DEFAULTS["lora_alpha"])
    alpha = _matched(config.get("alpha_pattern") or {}, path, default)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"the rank of {path!r} is {_short(rank)}, not a whole number >= 1")
    if type(alpha) not in (int, float) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"the alpha of {path!r} is {_short(alpha)}, which must be positive: leave the layer "
            "out of the adapter, or change the sign of its lora_B"
        )
    return rank, float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _matched(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path after a dot, or all of it."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ValueError(f"{_short(pattern)} is no regular expression: {error}") from None
    return default


def _only(path: str) -> str:
    r"""A pattern of this very path: PEFT puts ``(.*\.)?`` before it and ``$`` behind."""
    return rf"\A{re.escape(path)}\Z"


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def _short(value: object) -> str:
    return printable(repr(value), 80)
