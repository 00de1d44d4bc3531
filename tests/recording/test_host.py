"""What a record says of the machine."""

from __future__ import annotations

import pytest
import torch

from dynarank.recording.host import hardware


def test_cpus_of_one_name_with_other_instructions_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    for instructions in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=instructions: it)
        said.append(hardware(torch.device("cpu")))
    assert "AVX2" in said[0] and "AVX512" in said[1]
    assert said[0].replace("AVX2", "AVX512") == said[1]
