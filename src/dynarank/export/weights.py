"""The weights of a plain model as a file: safetensors, or ``.pt`` as ``torch.save`` writes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.export.batch_axis import Batch
from dynarank.export.program import Exported, Run, written
from dynarank.files.tensors import load_tensors, save_tensors
from dynarank.files.version import __version__
from dynarank.layers.running import call_model, preserve_state

__all__ = ["chains", "write_weights"]


def write_weights(
    plain: nn.Module,
    path: Path,
    batch: Batch | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write the state of a plain model, by the file's suffix; load it again and compare.

    A safetensors file's header says what each row of factors is made of (``layers``), and which
    names are another's (tied weights are stored once, as ``safetensors.torch.load_model`` reads
    them).

    Args:
        plain: from :func:`dynarank.to_plain`.
        path: ``.safetensors``, or else a state dict by ``torch.save``.
        batch: what the outputs are compared on; None: only the tensors are.
        metadata: more text for the header.

    Raises:
        ValueError: what is read again is not what was written.

    Example:
        >>> plain = dr.to_plain(dr.factorize(nn.Sequential(nn.Linear(64, 64)), 8, layers="0"))
        >>> path = getfixture("tmp_path") / "model.safetensors"
        >>> write_weights(plain, path).path.name
        'model.safetensors'
    """
    state, same = _state(plain)
    told = {"format": "pt", "dynarank": __version__, "layers": json.dumps(chains(plain))}
    header = {**told, **(metadata or {}), **same}
    safe = path.suffix == ".safetensors"

    def write(beside: Path) -> None:
        if safe:
            save_tensors(beside, state, header)
        else:
            torch.save(state | {name: state[other] for name, other in same.items()}, beside)

    def load(beside: Path) -> Run:
        found = load_tensors(beside) if safe else torch.load(beside, weights_only=True)
        return _run_with(plain, state, found)

    return written(path, write, load, plain, batch, 0.0)


def chains(plain: nn.Module) -> dict[str, list[str]]:
    """The layers of a plain model that are rows of factors: the modules of each, as they print."""
    return {
        path: [repr(one) for one in module]
        for path, module in plain.named_modules()
        if isinstance(module, nn.Sequential) and {"rank", "decomposition"} <= vars(module).keys()
    }


def _state(plain: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state, each once, and the other names of those that have several."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if (other := first.setdefault(id(tensor), name)) != name:
            same[name] = other
        else:
            state[name] = tensor.detach().cpu().contiguous()
    return state, same


def _run_with(plain: nn.Module, state: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Run:
    """The model with the tensors that were read, which must be those that were written."""
    for name, tensor in state.items():
        if name not in found or not _same(found[name], tensor):
            raise ValueError(f"the file was not written rightly: its {name} is another")
    twin = copy.deepcopy(plain)
    twin.load_state_dict(found, strict=False)  # a tied name is there once

    def run(batch: Batch) -> Any:
        with preserve_state(twin, training=False, grad=False):
            return call_model(twin, batch.example)

    return run


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
    )
