"""The help of every command fits a terminal of 80 columns: no text is cut."""

from __future__ import annotations

import pytest
from command_line import call

from dynarank.cli import COMMANDS


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_text_of_the_help_is_cut(
    command: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
    assert call(monkeypatch, *command.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown and max(map(len, shown.splitlines())) <= columns
    assert [line for line in shown.splitlines() if "…" in line] == []
