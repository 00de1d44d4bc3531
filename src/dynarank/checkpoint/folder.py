"""STUB"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Contents:
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]


def write_folder(folder: Path, contents: Contents, *, sync: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, t in contents.tensors.items():
        save_file({k: v.contiguous() for k, v in t.items()}, folder / f"{n}.safetensors")
    for n, d in contents.data.items():
        (folder / f"{n}.json").write_text(json.dumps(d, allow_nan=False))


def read_folder(folder: Path, verify: Literal["full", "size"] = "full") -> Contents:
    return Contents(
        {p.stem: load_file(p) for p in folder.glob("*.safetensors")},
        {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")},
    )
