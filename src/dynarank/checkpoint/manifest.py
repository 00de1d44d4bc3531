"""The manifest of a checkpoint: which files it has, their sizes and SHA-256, and its own."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynarank.files.json_data import dump_json, parse_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, read_bytes

__all__ = [
    "MANIFEST",
    "Entry",
    "Manifest",
    "NewerFormatError",
    "check_name",
    "is_name",
    "read_manifest",
]

MANIFEST = "MANIFEST.json"
VERSION = 1
_FORMAT = "dynarank checkpoint"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}\.(json|safetensors)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_BYTES = 1 << 20


class NewerFormatError(ValueError):
    """A checkpoint that a newer version wrote: it is whole, and this version cannot read it."""


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint.

    Args:
        size: in bytes.
        sha256: as hex digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Args:
        files: by name.
        step: of the run, if it has one.
    """

    files: dict[str, Entry]
    step: int | None = None

    def dump(self) -> bytes:
        """The bytes of MANIFEST.json; equal manifests have equal bytes."""
        files = {name: {"size": e.size, "sha256": e.sha256} for name, e in self.files.items()}
        return _seal({"format": _FORMAT, "version": VERSION, "step": self.step, "files": files})


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, to the last byte.

    Raises:
        FileNotFoundError: the folder has none.
        DamagedFileError: it is not the manifest that was written.
        NewerFormatError: it is, by a newer version.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise DamagedFileError(path, "it is a symbolic link")
    data = read_bytes(path, _MAX_BYTES)
    found = parse_json(data, str(path))
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DamagedFileError(path, f"it is not the manifest of a {_FORMAT}")
    body = {key: value for key, value in found.items() if key != "sha256"}
    if data != _seal(body):
        raise DamagedFileError(path, "it has changed since it was written (SHA-256 differs)")
    version = body.get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerFormatError(
            f"{folder} was written by a newer version of dynarank (format {version}, this one reads"
            f" up to {VERSION}); update dynarank to read it"
        )
    try:
        return _manifest(body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(path, f"{printable(str(error))}") from error


def is_name(name: str) -> bool:
    """Whether a file of a checkpoint may have this name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Refuse a file name that is not one of a checkpoint: lower case, .json or .safetensors.

    Raises:
        ValueError: it is another.
    """
    if not is_name(name):
        raise ValueError(
            f"{printable(name)!r} is not a file name of a checkpoint: up to 100 of a-z, 0-9, _ and"
            " -, then .json or .safetensors"
        )


def _seal(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(dump_json(body).encode()).hexdigest()
    return (dump_json({**body, "sha256": digest}) + "\n").encode()


def _manifest(body: dict[str, Any]) -> Manifest:
    if body.keys() != {"format", "version", "step", "files"} or body["version"] != VERSION:
        raise ValueError("it has other fields than a manifest of its version")
    step = body["step"]
    if not (step is None or _natural(step)):
        raise ValueError(f"its step is {step!r}")
    return Manifest({name: _entry(name, entry) for name, entry in body["files"].items()}, step)


def _entry(name: str, entry: Any) -> Entry:
    check_name(name)
    size, digest = entry["size"], entry["sha256"]
    if len(entry) != 2 or not _natural(size) or not _SHA256.fullmatch(digest):
        raise ValueError(f"the entry of {name} is not a size and a SHA-256")
    return Entry(size, digest)


def _natural(number: object) -> bool:
    return type(number) is int and number >= 0
