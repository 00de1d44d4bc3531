"""What a file that is not a file of weights is, from its first bytes and name, and the way out."""

from __future__ import annotations

import zipfile
from pathlib import Path

from dynarank.files.reading import DamagedFileError

__all__ = ["refuse_foreign"]

_FIRST = {
    b"version https://git-lfs": (
        "it is a Git LFS pointer, not the weights themselves",
        "fetch them with git lfs pull, or download the file again",
    ),
    b"GGUF": (
        "it is a GGUF file of llama.cpp, mostly quantized",
        "use the checkpoint that it was converted from",
    ),
    b"\x89HDF\r\n\x1a\n": (
        "it is an HDF5 file, as Keras and TensorFlow write",
        "load it there and save its arrays with safetensors.numpy.save_file",
    ),
    b"\x93NUMPY": (
        "it is an array of NumPy",
        'save it with safetensors.numpy.save_file({"weight": array}, FILE)',
    ),
    b"<": ("it looks like a web page or XML, so that a download went wrong", "download it again"),
    b"\x1f\x8b": ("it is compressed by gzip", "unpack it first"),
    b"\xfd7zXZ": ("it is compressed by xz", "unpack it first"),
    b"BZh": ("it is compressed by bzip2", "unpack it first"),
    b"7z\xbc\xaf": ("it is a 7-Zip archive", "unpack it first"),
}
_NAMED = {
    ".onnx": ("it is an ONNX model", "use the PyTorch checkpoint that it was exported from"),
    ".msgpack": ("it is a checkpoint of Flax", "save its arrays with safetensors.numpy.save_file"),
    ".tflite": ("it is a model of TensorFlow Lite", "use the checkpoint that it was made from"),
    ".pb": ("it is a model of TensorFlow", "use a PyTorch or safetensors checkpoint of it"),
}
_NUMPY = (
    "it is an archive of NumPy (.npz)",
    "save it with safetensors.numpy.save_file(dict(numpy.load(FILE)), NEW)",
)


def refuse_foreign(path: Path) -> None:
    """Refuse a file of another format by its name.

    Raises:
        DamagedFileError: it is one that is known; the message says what it is and what to do.

    Example:
        >>> path = getfixture("tmp_path") / "model.safetensors"
        >>> _ = path.write_text("version https://git-lfs.github.com/spec/v1")
        >>> refuse_foreign(path)
        Traceback (most recent call last):
        dynarank.files.reading.DamagedFileError: ...it is a Git LFS pointer, not the weights...
    """
    with path.open("rb") as file:
        begins = file.read(64)
    found = next((known for mark, known in _FIRST.items() if begins.startswith(mark)), None)
    if found is None and begins.startswith(b"PK") and _is_numpy(path):
        found = _NUMPY
    if found := found or _NAMED.get(path.suffix.lower()):
        raise DamagedFileError(path, *found)


def _is_numpy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
