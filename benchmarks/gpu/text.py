"""A text as bytes: books, if there are any, or the sources that every installation has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Text", "read_text"]

_ROOT = Path(__file__).parents[2]
_HELD_OUT = 20  # of the files, every such one
_FOLDERS = "docs", "src", "benchmarks", "tests", "examples"


@dataclass(frozen=True)
class Text:
    """A text in two parts.

    Args:
        train: its bytes, to train on.
        held_out: those of other files.
        name: what it is.
    """

    train: Tensor
    held_out: Tensor
    name: str

    def to(self, device: torch.device) -> Text:
        """The same on a device."""
        return Text(self.train.to(device), self.held_out.to(device), self.name)

    def about(self) -> dict[str, str | int]:
        """Its name, sizes and a digest; it has to be on the CPU."""
        digest = hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:16]
        sizes = {"train_bytes": len(self.train), "held_out_bytes": len(self.held_out)}
        return {"text": self.name, **sizes, "sha256": digest}


def read_text(data: Path | None, most: int) -> Text:
    """Books from a folder, or sources and documentation of this project and of torch.

    Args:
        data: a folder with ``books/split/train*.txt`` and ``books/split/valid.txt``, or None.
        most: bytes to train on, at most.

    Raises:
        FileNotFoundError: the folder has no books.
    """
    if data is None:
        return _sources(most)
    folder = data / "books" / "split"
    if not (found := sorted(folder.glob("train*.txt"))):
        raise FileNotFoundError(f"no train*.txt in {folder}")
    train, held_out = _read(found[:1], most), _read([folder / "valid.txt"], most)
    return Text(train, held_out, "books")


def _sources(most: int) -> Text:
    own = [path for name in _FOLDERS for path in sorted((_ROOT / name).rglob("*"))]
    files = [path for path in own if path.suffix in (".py", ".md")]
    files += sorted(Path(torch.__file__).parent.rglob("*.py"))
    train = [path for i, path in enumerate(files) if i % _HELD_OUT]
    name = "sources and documentation of dynarank, then Python sources of torch, by file"
    return Text(_read(train, most), _read(files[::_HELD_OUT], most), name)


def _read(files: Iterable[Path], most: int) -> Tensor:
    found = bytearray()
    for path in files:
        if len(found) >= most:
            break
        found += path.read_bytes()
    return torch.from_numpy(np.frombuffer(bytes(found[:most]), np.uint8).copy())
