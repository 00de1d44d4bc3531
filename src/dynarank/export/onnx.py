"""A trained model as an ONNX file, compared in onnxruntime; needs the extra ``dynarank[onnx]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynarank.export.batch_axis import Batch
from dynarank.export.plain import Keep
from dynarank.export.program import Exported, Run, export_program, first_line, quiet, ready, written
from dynarank.export.same_outputs import tensors_in
from dynarank.files.atomic import write_bytes
from dynarank.layers.running import call_model, preserve_state
from dynarank.surgery.selection import LayerFilter

__all__ = ["to_onnx"]

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LIMIT = 2**31 - 1  # bytes of a protobuf file


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    keep: Keep = "cheaper",
    layers: LayerFilter = None,
    batch_dim: int | None = 0,
    tolerance: float | None = None,
) -> Exported:
    """Write the plain model as an ONNX file, and compare what onnxruntime computes with it.

    The file is compared on batches of three sizes, the example's among them, before it takes its
    place. Inputs have the names of the forward pass's parameters, outputs those that the model
    gives them (``logits``), or ``output``. The model is as it was.

    Args:
        model: any model, ranked or not, see :func:`dynarank.to_plain`.
        example: a batch: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file; one that is there is replaced, and its folder is created.
        keep: which factors are kept, see :func:`dynarank.to_plain`.
        layers: see :func:`dynarank.to_plain`.
        batch_dim: the dimension of the inputs that may have any size; None: none may.
        tolerance: the largest difference allowed, relative to the largest entry of an output.
            None: 1e-4, or 5e-2 if an output is in half precision.

    Raises:
        ImportError: the packages of ``dynarank[onnx]`` are not installed.
        ValueError: torch cannot export the model, or the file computes something else. The file
            that was there stays.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 8)
        >>> path = getfixture("tmp_path") / "model.onnx"
        >>> to_onnx(model, torch.randn(2, 64), path).difference < 1e-4
        True
    """
    _check_installed()
    plain, batch = ready(model, example, keep, layers, batch_dim)
    with preserve_state(plain, training=False, grad=False):
        outputs = [name for name, _ in tensors_in(call_model(plain, batch.example))]
    inputs = [name for name, _ in tensors_in(batch.arguments(plain))]
    data = _serialized(plain, batch, inputs, outputs)

    def write(beside: Path) -> None:
        write_bytes(beside, data)

    return written(
        Path(path), write, lambda beside: _loaded(beside, plain), plain, batch, tolerance
    )


def _check_installed() -> None:
    for name in _NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"to_onnx needs `{name}`, which is not installed: pip install 'dynarank[onnx]'"
            ) from error


def _serialized(
    plain: nn.Module, batch: Batch, inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    size = sum(t.numel() * t.element_size() for t in plain.state_dict().values())
    if size > _LIMIT:
        raise ValueError(
            f"the model has {size:,} bytes, and one ONNX file holds at most {_LIMIT:,}: export it "
            "in half precision (model.half()), or to .pt2 or .safetensors"
        )
    program = export_program(plain, batch)
    names: dict[str, Any] = {"input_names": inputs, "output_names": outputs}
    with quiet():
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        except Exception as error:
            raise ValueError(
                f"torch.onnx cannot convert this model ({first_line(error.__cause__ or error)}); "
                "a .pt2 file needs no conversion"
            ) from error
    assert made is not None
    return made.model_proto.SerializeToString()


def _loaded(path: Path, plain: nn.Module) -> Run:
    """The file in onnxruntime, on one thread of the CPU."""
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"onnxruntime does not run this model on the CPU ({first_line(error)}); nothing is "
            "written"
        ) from error
    inputs = {one.name for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]

    def run(batch: Batch) -> Mapping[str, Any]:
        given = dict(tensors_in(batch.arguments(plain)))
        found = session.run(names, {n: x.numpy() for n, x in given.items() if n in inputs})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run
