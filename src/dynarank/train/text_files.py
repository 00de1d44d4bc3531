"""A text corpus from a folder, split by file; by default the sources of the standard library.

A corpus depends only on the files: sorted by a hash of their paths, without duplicates, truncated
to a size. The standard library differs between Python versions: ``TextData.sha256`` identifies the
bytes that a run was trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynarank.train.sources import DataError

__all__ = ["PATTERNS", "TextData", "load_split_text", "load_text", "standard_library"]

PATTERNS = ("*.txt", "*.md", "*.rst", "*.tex", "*.py", "*.c", "*.h", "*.rs", "*.js", "*.html")
_MAX_BYTES = 8_000_000
_HELD_OUT = 0.05  # share of the bytes for testing
_END = b"\0"  # ends each file; not a byte of text, so that a model can see the boundary
# Not part of the library itself: packages installed next to it, and its tests.
_BESIDE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, eq=False)
class TextData:
    """A corpus as bytes.

    Args:
        train: uint8 ``(bytes,)``; every file ends with a zero byte.
        test: uint8 ``(bytes,)``, from files that are not in ``train`` (or the ends of files that
            are too large to be held out whole).
        files: the number of files.
        source: the location of the files.
    """

    train: Tensor
    test: Tensor
    files: int
    source: str

    @property
    def sha256(self) -> str:
        """A digest of the training bytes followed by the test bytes."""
        digest = hashlib.sha256(self.train.numpy().data)
        digest.update(self.test.numpy().data)
        return digest.hexdigest()


def load_text(
    place: str | None,
    *,
    patterns: Sequence[str] = PATTERNS,
    max_bytes: int = _MAX_BYTES,
    held_out: float = _HELD_OUT,
) -> TextData:
    """Read a corpus.

    Args:
        place: a folder, searched recursively except for hidden folders; a single file of any name;
            None: the sources of the Python standard library.
        patterns: glob patterns for the names of text files.
        max_bytes: the maximum size of the corpus, training and test together.
        held_out: the share of the bytes for testing, in (0, 1).

    Raises:
        DataError: if there are no matching files.
        ValueError: if ``max_bytes`` or ``held_out`` is out of range.

    Example:
        >>> data = load_text(None, max_bytes=100_000)
        >>> len(data.train) + len(data.test) <= 100_000, data.train.dtype
        (True, torch.uint8)
    """
    if max_bytes < 2 or not 0 < held_out < 1:
        raise ValueError(
            f"max_bytes must be at least 2 and held_out between 0 and 1, got {max_bytes} and "
            f"{held_out}"
        )
    if place is None:
        root = standard_library()
        files = _files(root, ["*.py"], _BESIDE)
        wanted = "sources (*.py) of the Python standard library"
        advice = "this Python has only compiled files; pass a folder of text with --data"
    else:
        root = Path(place).expanduser()
        files = [root] if root.is_file() else _files(root, patterns, set())
        wanted = f"files named {', '.join(patterns)}"
        advice = "pass the folder that contains them, or a single file" + _state(root)
    texts = _read(files, max_bytes)
    if not texts:
        raise DataError(f"there are no {wanted} in {root}: {advice}")
    train, test = _split(texts, held_out)
    return TextData(_tensor(train), _tensor(test), len(texts), str(root))


def load_split_text(place: Path, *, max_bytes: int, held_out: float) -> TextData:
    """Read a corpus that may be split already; otherwise as :func:`load_text`.

    Args:
        place: a folder with ``train.txt`` or ``train/``, and ``valid``, ``validation``, ``val`` or
            ``test`` likewise; or any other folder or file.
        max_bytes: the maximum size of the corpus; of the test part, its share ``held_out``.
        held_out: the share of the bytes for testing.

    Raises:
        DataError: there is no text, or a training part without a test part.
    """
    train = _part_of(place, ["train"])
    if train is None:
        return load_text(str(place), max_bytes=max_bytes, held_out=held_out)
    test = _part_of(place, ["valid", "validation", "val", "test"])
    if test is None:
        raise DataError(f"{train} is there, but no valid, validation, val or test beside it")
    sizes = int((1 - held_out) * max_bytes), int(held_out * max_bytes)
    texts: list[list[bytes]] = []
    for part, size in zip((train, test), sizes, strict=True):
        texts.append(_read([part] if part.is_file() else _files(part, PATTERNS, set()), size))
        if not texts[-1]:
            raise DataError(f"there is no text in {part}")
    one, two = (_tensor(b"".join(part)) for part in texts)
    return TextData(one, two, sum(map(len, texts)), str(place))


def _part_of(place: Path, names: Sequence[str]) -> Path | None:
    """The file or folder of a part of a corpus."""
    able = [place / end for name in names for end in (f"{name}.txt", name)]
    return next((path for path in able if path.exists()), None)


def standard_library() -> Path:
    """The folder of the Python standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _state(root: Path) -> str:
    return "" if root.exists() else f" ({root} does not exist)"


def _files(root: Path, patterns: Sequence[str], beside: set[str]) -> list[Path]:
    """The files, sorted by a hash of their paths, which shuffles them reproducibly."""
    named = ((path.relative_to(root), path) for path in root.rglob("*"))
    kept = [
        (relative.as_posix(), path)
        for relative, path in named
        if any(fnmatchcase(relative.name, pattern) for pattern in patterns)
        and not any(part.startswith(".") or part in beside for part in relative.parts)
        and path.is_file()
    ]
    kept.sort(key=lambda item: hashlib.sha256(item[0].encode(errors="surrogateescape")).digest())
    return [path for _, path in kept]


def _read(files: Iterable[Path], max_bytes: int) -> list[bytes]:
    """Read the files, without duplicates, until there are enough bytes."""
    seen: set[bytes] = set()
    texts: list[bytes] = []
    room = max_bytes
    for path in files:
        if room < 2:
            break
        try:
            with path.open("rb") as file:
                text = file.read(room - 1)
        except OSError as error:
            raise DataError(f"{path} could not be read: {error}") from error
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:
            seen.add(digest)
            texts.append(text + _END)
            room -= len(text) + 1
    return texts


def _split(texts: Sequence[bytes], held_out: float) -> tuple[bytes, bytes]:
    """Hold out whole files in order while they fit; otherwise the end of each file."""
    wanted = held_out * sum(map(len, texts))
    room, train, test = wanted, list[bytes](), list[bytes]()
    for text in texts:
        side = test if len(text) <= room else train
        side.append(text)
        room -= len(text) if side is test else 0
    if sum(map(len, test)) < wanted / 2:  # a few large files
        cuts = [len(text) - max(1, round(held_out * len(text))) for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        test = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return b"".join(train), b"".join(test)


def _tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())
