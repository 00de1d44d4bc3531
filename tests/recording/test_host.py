"""What a record says of the machine."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest
import torch

from dynarank.files.version import __version__
from dynarank.recording.host import hardware, versions


def test_cpus_of_one_name_with_other_instructions_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    for instructions in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=instructions: it)
        said.append(hardware(torch.device("cpu")))
    assert "AVX2" in said[0] and "AVX512" in said[1]
    assert said[0].replace("AVX2", "AVX512") == said[1]


def test_the_version_is_known_where_the_package_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "dynarank":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("dynarank.recording.host.version", version)
    assert versions() == {"dynarank": __version__, "torch": "1", "numpy": "1"} | {
        "python": platform.python_version()
    }
