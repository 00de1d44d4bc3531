"""The folder of a PEFT adapter: its configuration, its tensors, and the base beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dynarank.checkpoint.folder import put_in_place, settle
from dynarank.files.atomic import make_folder, remove_orphans, temporary_beside, write_text
from dynarank.files.json_data import read_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import TensorFile, load_tensors, save_tensors

__all__ = ["BASE", "is_pretrained", "read_adapter", "write_adapter"]

BASE = "base"
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FILES = "files"  # in the header of the tensors: what else was written


def is_pretrained(model: object) -> bool:
    """Whether it writes a folder of its own, as transformers' models do."""
    return callable(getattr(model, "save_pretrained", None))


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Any
) -> None:
    """Write the whole folder beside its place, then put it there.

    Args:
        folder: where; an earlier export is replaced, nothing else.
        config: the configuration.
        tensors: by PEFT's names.
        base: the base model; None: it is stored elsewhere.
    """
    make_folder(folder.parent, folder)
    remove_orphans(folder.parent, f"{folder.name}.")
    settle(folder)
    _check_ours(folder)
    with temporary_beside(folder) as beside:
        beside.mkdir()
        if base is not None:
            _write_base(base, beside / BASE)
        write_text(beside / _CONFIG, json.dumps(config, indent=2) + "\n")
        files = json.dumps(_files(beside))
        save_tensors(beside / _TENSORS, tensors, {"format": "pt", _FILES: files})
        if not put_in_place(beside, folder, sync=True):  # a volume that cannot rename folders
            shutil.copytree(beside, folder)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the tensors are a pickle.
        DamagedFileError: a file is damaged.
    """
    if not (folder / _TENSORS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} holds its tensors as adapter_model.bin, which is a pickle and is not read: "
            "let PEFT load and save it again (save_pretrained writes safetensors)"
        )
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise DamagedFileError(folder / _CONFIG, "it is not a JSON object")
    return config, load_tensors(folder / _TENSORS)


def _write_base(base: Any, folder: Path) -> None:
    if is_pretrained(base):
        base.save_pretrained(folder)
        return
    folder.mkdir()
    state = {name: value for name, value in base.state_dict().items() if _is_tensor(name, value)}
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})


def _is_tensor(name: str, value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    raise ValueError(
        f"the state of the base has {name!r}, a {type(value).__name__} and no tensor: save the "
        'base yourself, and give its path, dr.to_peft(model, folder, base="path")'
    )


def _check_ours(folder: Path) -> None:
    """Raise ValueError if a folder holds anything but an earlier export."""
    if not folder.exists():
        return
    foreign = _files(folder) if folder.is_dir() else [folder.name]
    if foreign and folder.is_dir():
        try:
            known = json.loads(TensorFile(folder / _TENSORS).metadata.get(_FILES, "[]"))
            foreign = sorted({*foreign} - {_TENSORS, *known}) if known else foreign
        except (FileNotFoundError, ValueError):
            pass
    if foreign:
        raise ValueError(
            f"{folder} holds something else than an export of dr.to_peft "
            f"({printable(foreign[0])}): nothing was written; give a new folder, or move it away"
        )


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
