"""Call the command line in this process."""

from __future__ import annotations

import sys

import pytest

from dynarank.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dynarank", *words])
    with pytest.raises(SystemExit) as stop:
        main()
        raise SystemExit(0)
    code = stop.value.code
    return code if isinstance(code, int) else 0
