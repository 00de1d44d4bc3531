"""Which weights a model's files contain, whatever their layout, and what had to be left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

from dynarank.files.json_data import DamagedFileError
from dynarank.files.printable import printable
from dynarank.monitors.stored_factors import factor_chain, lora_update
from dynarank.monitors.stored_layouts import (
    expert_count,
    experts_of,
    is_stack,
    packed_fp4,
    packed_integers,
    parametrized,
    scaled,
    spectral_norm,
    unclear_stack,
    unknown_scales,
    weight_norm,
)
from dynarank.monitors.stored_weight import (
    Claim,
    LeftOut,
    StoredWeight,
    as_layer,
    layer_shape,
    natural_order,
)
from dynarank.monitors.weight_files import WeightFiles

__all__ = ["Role", "StoredWeights", "role_of", "stored_weights", "survey_files"]

Role: TypeAlias = Literal["", "embedding", "head"]
_LAYOUTS: tuple[Callable[[WeightFiles, str], Claim | None], ...] = (
    factor_chain,
    lora_update,
    packed_fp4,
    packed_integers,
    weight_norm,
    spectral_norm,
    parametrized,
    scaled,
)
# Entries of a state that are no weights of a layer: biases and buffers, states of an optimizer.
_NO_WEIGHTS = (
    "bias", "mask", "running_mean", "running_var", "num_batches_tracked", "position_ids",
    "token_type_ids", "inv_freq", "freqs_cis", "cos_cached", "sin_cached", "absmax", "quant_map",
    "relative_position_index", "zero_point", "zero_points", "qzeros", "g_idx", ".scales", "_scales",
    "_scale", "_scale_inv", "exp_avg", "exp_avg_sq", "momentum_buffer", "saved_forms",
)  # fmt: skip
_OPTIMIZER = re.compile(r"(?:^|\.)optimizer(?:_states?)?\.")
_LONGEST = 4_096  # characters of a name in which layouts are looked for
_EMBEDDINGS = re.compile(
    r"wte|wpe|shared|(?:\w*_)?emb|tok_?embeddings?|\w*embed(?:ding)?s?(?:_tokens|_positions|_in)?"
    r"|relative_attention_bias",
    re.IGNORECASE,
)
_HEADS = re.compile(
    r"\w*lm_head|head|classifier|score|embed_out|output_projection|logits|fc_out|qa_outputs"
    r"|classification_head|to_logits|decoder_output"
)
_STACKED_ROWS = re.compile(r"experts\.mlp\.(?:w1|v1|w2)$")  # of DBRX: (experts * out, in)
_WORDS = {"complex64", "complex128", "bool", "quantized", "sparse"}


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model's files in the order of layers, and what was left out."""

    weights: list[StoredWeight]
    left_out: list[LeftOut]


def stored_weights(files: WeightFiles) -> list[StoredWeight]:
    """All weights of two or more dimensions, in the order of layers; see :func:`survey_files`.

    Raises:
        ValueError: there are none, or two have the same name.
    """
    return survey_files(files).weights


def survey_files(files: WeightFiles) -> StoredWeights:
    """Find the weights in files: as a layer multiplies by them, in (out, in, *kernel).

    Known are: plain tensors of any floating-point dtype; transposed convolutions and ``Conv1D``;
    factors and adapters of dynarank, LoRA (their product); ``weight_norm``, ``spectral_norm`` and
    ``prune``; fp8 and int8 with scales; fp4 with scales; stacks of experts (one weight for each).
    Anything else that may be a weight is left out, with the reason.

    Raises:
        ValueError: there are no weights, or two have the same name.
    """
    claims: dict[str, Claim] = {}
    taken: set[str] = set()
    for layout in _LAYOUTS:
        for name in files.homes:
            known = name not in taken and len(name) <= _LONGEST
            claim = layout(files, name) if known else None
            if claim is not None and not taken & set(claim.tensors):
                claims[name] = claim
                taken |= set(claim.tensors)
    for name, claim in unknown_scales(files, claims).items():
        claims[name] = claim
        taken |= set(claim.tensors)
    weights: list[StoredWeight] = []
    left_out: list[LeftOut] = []
    for name in natural_order(files.homes):
        claim = claims.get(name) or (None if name in taken else _single(files, name))
        if claim is not None:
            weights += (w for w in claim.weights if math.prod(w.shape))
            if claim.reason:
                stored = files.stored(name)
                left_out.append(LeftOut(name, stored.shape, stored.kind, claim.reason))
    _refuse_twins(files, weights)
    if not weights:
        raise ValueError(_nothing(files, left_out))
    weights[1:] = map(_with_groups, weights, weights[1:])
    return StoredWeights(weights, left_out)


def _single(files: WeightFiles, name: str) -> Claim | None:
    """What a tensor is that belongs to no known layout."""
    stored = files.stored(name)
    weight = re.search(r"(?:^|[._])weight$", name) is not None
    if len(stored.shape) < 2 or _is_no_weight(name):
        return None
    if stored.dtype is None:
        reason = _unread(stored.kind, weight)
        return Claim((), (name,), reason) if reason else None
    if not weight and stored.shape[0] == 1 and len(stored.shape) > 2:
        return None  # a class token, embeddings of positions
    if stored.first not in ("", files.names[name]):
        return Claim((), (name,), f"tied: the same tensor as {printable(stored.first)}")
    if unclear := unclear_stack(files, name, stored.shape):
        return Claim((), (name,), unclear)
    layer = name.removesuffix(".weight")
    if is_stack(files, layer, stored.shape):
        one = stored.shape[1:]
        return Claim(
            experts_of(layer, stored.shape[0], one, (name,), _slices(files, name)), (name,)
        )
    if _STACKED_ROWS.search(name) and len(stored.shape) == 2:
        return _stacked_rows(files, name)
    shape, groups = layer_shape(files, layer, stored.shape)

    def parts() -> tuple[Tensor, ...]:
        return (as_layer(files.read(name), groups),)

    plain = StoredWeight(layer, shape, (name,), parts, math.prod(shape))
    return Claim((plain,), (name,))


def _is_no_weight(name: str) -> bool:
    return name.endswith(_NO_WEIGHTS) or _OPTIMIZER.search(name) is not None


def _slices(files: WeightFiles, name: str) -> Callable[[int], Tensor]:
    return lambda index: files.read(name, index)


def _stacked_rows(files: WeightFiles, name: str) -> Claim:
    rows, columns = files.stored(name).shape
    count = expert_count(files)
    if count is None or rows % count:
        return Claim(
            (), (name,), "experts stacked in one matrix; config.json does not say how many"
        )
    size = rows // count
    return Claim(
        experts_of(
            name, count, (size, columns), (name,),
            lambda index: files.read(name)[index * size : (index + 1) * size],
        ),
        (name,),
    )  # fmt: skip


def _unread(kind: str, weight: bool) -> str:
    """Why a tensor of a dtype that is not a number of its own is left out; empty: no weight."""
    if kind in _WORDS:
        return f"{kind} values are not read as a weight"
    if kind in ("int8", "uint8") or kind.startswith("float"):
        return f"{kind} without scales that are known: save a dequantized checkpoint"
    return f"{kind} values are not read as a weight" if weight else ""


def _with_groups(before: StoredWeight, weight: StoredWeight) -> StoredWeight:
    """The weight with its groups: its inputs are the outputs of the convolution before it.

    Both belong to one block: their names differ in one number. Depthwise weights tell themselves.
    """
    outputs, inputs = before.shape[0], weight.shape[1]
    if len(before.shape) != len(weight.shape) or math.prod(weight.shape[2:]) == 1 or inputs == 1:
        return weight
    names = [re.split(r"(\d+)", one.name) for one in (before, weight)]
    differ = [a != b for a, b in zip(*names, strict=False)]
    if len(names[0]) != len(names[1]) or sum(differ) != 1 or any(differ[::2]):
        return weight
    groups, rest = divmod(outputs, inputs)
    return replace(weight, groups=groups) if not rest and weight.shape[0] % groups == 0 else weight


def _refuse_twins(files: WeightFiles, weights: Iterable[StoredWeight]) -> None:
    """Refuse ``a`` beside ``a.weight``: nothing says which one is the layer's."""
    seen: dict[str, StoredWeight] = {}
    for weight in weights:
        twin = seen.setdefault(weight.name, weight)
        if twin is not weight:
            names = " and ".join(printable(one.tensors[0]) for one in (twin, weight))
            raise DamagedFileError(
                files.path, f"{names} are both the weight of {printable(weight.name)}", "rename one"
            )


def _nothing(files: WeightFiles, left_out: list[LeftOut]) -> str:
    if left_out:
        one = left_out[0]
        more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        return (
            f"{files.path} contains no weight whose spectrum is known: {printable(one.name)} "
            f"({one.dtype} {'x'.join(map(str, one.shape))}) is left out, {one.reason}{more}"
        )
    kinds = ", ".join(dict.fromkeys(_kinds(files)))
    there = f"; its {len(files.homes)} tensors are {printable(kinds)}" if kinds else ""
    return f"{files.path} contains no weight of two or more dimensions{there}"


def _kinds(files: WeightFiles) -> Iterator[str]:
    for name in files.homes:
        stored = files.stored(name)
        yield f"{stored.kind} of {len(stored.shape)} dimensions"


def role_of(weight: StoredWeight, files: WeightFiles) -> Role:
    """Whether a weight is an embedding or the head (output layer), by its name and the config.

    Example:
        >>> import types
        >>> one = types.SimpleNamespace(name="model.embed_tokens", shape=(8, 4), kind="plain")
        >>> role_of(one, WeightFiles(None, {}))
        'embedding'
    """
    if len(weight.shape) != 2 or weight.kind == "expert":
        return ""
    last = weight.name.rpartition(".")[2]
    if _EMBEDDINGS.fullmatch(last):
        return "embedding"
    if _HEADS.fullmatch(last) or _ends_head(weight.name, files):
        return "head"
    known = files.config.get("vocab_size")
    numbered = re.search(r"(?:^|[.])\d+[.]", weight.name)  # one of many layers
    return "head" if known and weight.shape[0] == known and not numbered else ""


def _ends_head(name: str, files: WeightFiles) -> bool:
    """Whether it is the last layer of a Sequential that is named as a head: classifier.6 of VGG."""
    match = re.fullmatch(r"((?:.*\.)?(\w+)\.)(\d{1,9})", name)
    if match is None or not _HEADS.fullmatch(match[2]):
        return False
    others = (re.fullmatch(re.escape(match[1]) + r"(\d{1,9})\.weight", n) for n in files.homes)
    numbers = [int(o[1]) for o in others if o and len(files.stored(o[0]).shape) == 2]
    return int(match[3]) == max(numbers, default=0)
