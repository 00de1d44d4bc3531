"""A trained model as one file that needs no class of its network: torch's own, ``.pt2``."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dynarank.export.batch_axis import Batch
from dynarank.export.plain import Keep, to_plain
from dynarank.export.same_outputs import allowance, difference, tensors_in
from dynarank.files.atomic import make_folder, replacing, write_bytes
from dynarank.files.printable import printable
from dynarank.layers.running import call_model, forward_arguments, preserve_state
from dynarank.surgery.selection import LayerFilter

__all__ = [
    "Exported",
    "export_program",
    "first_line",
    "plain_outputs",
    "ready",
    "to_pt2",
    "written",
]

Run = Callable[[Batch], Any]

_TOLERANCE = 1e-4  # fp32


@dataclass(frozen=True)
class Exported:
    """A file that a model has been written to, and what it computed when it was loaded again.

    Args:
        path: the file.
        size: in bytes.
        batch_sizes: the sizes of the batches that were compared.
        outputs: the names of the outputs.
        difference: the largest difference from the model's outputs, relative to the largest entry.
    """

    path: Path
    size: int
    batch_sizes: tuple[int, ...]
    outputs: tuple[str, ...]
    difference: float

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        with_sizes = f", with batches of {sizes}" if sizes else ""
        return (
            f"{self.path}: {self.size:,} bytes; its outputs differ by at most "
            f"{self.difference:.1e} from the model's{with_sizes}"
        )


def to_pt2(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    keep: Keep = "cheaper",
    layers: LayerFilter = None,
    batch_dim: int | None = 0,
    tolerance: float | None = None,
) -> Exported:
    """Write the plain model by ``torch.export``: it runs with torch alone, no class is needed.

    ``torch.export.load(path).module()`` is the model, in evaluation mode, on the CPU. The file is
    loaded and compared with the model on batches of three sizes, the example's among them, before
    it takes its place. The model is as it was.

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
        ValueError: torch cannot export the model, or the file computes something else. The file
            that was there stays.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 8)
        >>> path = getfixture("tmp_path") / "new" / "model.pt2"
        >>> to_pt2(model, torch.randn(2, 64), path).difference < 1e-5
        True
        >>> torch.export.load(path).module()(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """
    plain, batch = ready(model, example, keep, layers, batch_dim)
    data = io.BytesIO()
    torch.export.save(export_program(plain, batch), data)

    def load(beside: Path) -> Run:
        again = torch.export.load(io.BytesIO(beside.read_bytes())).module()
        return lambda one: call_program(again, plain, one)

    def write(beside: Path) -> None:
        write_bytes(beside, data.getvalue())

    return written(Path(path), write, load, plain, batch, tolerance)


def ready(
    model: nn.Module, example: Any, keep: Keep, layers: LayerFilter, batch_dim: int | None
) -> tuple[nn.Module, Batch]:
    """The plain model on the CPU in evaluation mode, and the batch to export it with.

    Its outputs are plain data, and the batch has at least two rows: torch takes sizes of one to be
    always one.
    """
    plain = to_plain(model, keep=keep, layers=layers, example=example).cpu().eval()
    plain.register_forward_hook(lambda module, args, output: plain_outputs(output))
    # Copies: torch writes the example into the file, with all the memory that it is a view of.
    example = tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), example)
    batch = Batch(example, batch_dim)
    return plain, batch if batch_dim is None or batch.size > 1 else batch.of_size(2)


def plain_outputs(value: Any) -> Any:
    """An output with dicts in place of dataclasses and the like, without what is no tensor."""
    if isinstance(value, Tensor) or (
        type(value) in (tuple, list) and all(isinstance(one, Tensor) for one in value)
    ):
        return value
    if not (found := dict(tensors_in(value))):
        raise ValueError(f"the model gives no tensors, but a {type(value).__name__}")
    return found


def export_program(plain: nn.Module, batch: Batch) -> Any:
    """The model as a graph.

    Raises:
        ValueError: torch cannot make one, or fixes the batch size.
    """
    args, named = forward_arguments(plain, batch.example)
    order = [name for name in batch.arguments(plain) if name in named]  # that of the inputs
    named = {name: named[name] for name in dict.fromkeys((*order, *named))}
    shapes = batch.shapes(plain)
    with quiet(), preserve_state(plain, training=False, grad=False):
        try:
            return torch.export.export(plain, args, named, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            way = "" if batch.dim is None else "; batch_dim=None fixes the batch size"
            told = f"torch.export cannot export this model ({first_line(error)}){way}"
            raise ValueError(told) from error


def first_line(error: BaseException) -> str:
    """What an error of others is, on one line."""
    return printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 300)


@contextmanager
def quiet() -> Generator[None]:
    """Without what torch's exporters say of themselves."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            warnings.filterwarnings("ignore", r"# The axis name", UserWarning)
            yield
    finally:
        log.setLevel(level)


def call_program(program: Any, plain: nn.Module, batch: Batch) -> Any:
    """The outputs of an exported program on a batch of the model."""
    args, named = forward_arguments(plain, batch.example)
    with torch.no_grad():
        return program(*args, **named)


def written(
    path: Path,
    write: Callable[[Path], object],
    load: Callable[[Path], Run],
    plain: nn.Module,
    batch: Batch | None,
    tolerance: float | None,
) -> Exported:
    """Write a file, load it, compare it with the model, and only then put it in its place.

    Args:
        path: the file.
        write: writes it.
        load: reads it, and returns what computes its outputs.
        plain: the model.
        batch: what they are compared on; None: nothing is.
        tolerance: the largest difference allowed; None: by the dtypes of the outputs.

    Raises:
        ValueError: it computes something else.
    """
    names, sizes, found = dict[str, None](), list[int](), 0.0
    make_folder(path.parent, path)
    with replacing(path) as beside:
        write(beside)
        run = load(beside)
        for one in _batches(batch):
            with preserve_state(plain, training=False, grad=False):
                expected = call_model(plain, one.example)
            off, name = difference(run(one), expected)
            found = max(found, off)
            allowed = max(_TOLERANCE, allowance(expected)) if tolerance is None else tolerance
            if off > allowed:
                raise ValueError(
                    f"{path.name} computes something else than the model: {name} is off by "
                    f"{off:.1e}, more than {allowed:g} (tolerance=); nothing is written"
                )
            names |= {name: None for name, _ in tensors_in(expected)}
            sizes += [one.size] if one.dim is not None else []
    return Exported(path, path.stat().st_size, tuple(sizes), tuple(names), found)


def _batches(batch: Batch | None) -> list[Batch]:
    """The batch, and some of other sizes if it may have any."""
    if batch is None or batch.dim is None:
        return [] if batch is None else [batch]
    return [batch, batch.of_size(batch.size + 1), batch.of_size(1)]
