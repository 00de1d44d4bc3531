"""What the first of several processes says of an error in another one."""

from __future__ import annotations

import pytest

from dynarank import cli
from dynarank.cli.processes import said_by_another
from dynarank.distributed.processes import PeerError
from dynarank.train.recipe_error import RecipeError

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:51892")
READING = PeerError("reading the data failed in process 1: OSError: no such file")


def caused() -> RecipeError:
    """What one's own network raises when it waits for a process that has ended."""
    error = RecipeError("a batch raised RuntimeError: ...")
    error.__cause__ = LOST
    return error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (LOST, 1, "another process has ended"),
        (caused(), 1, "another process has ended"),
        (READING, 1, "reading the data failed in process 1: OSError: no such file"),
        (RecipeError("a batch of 1"), 2, "a batch of 1"),
    ],
)
def test_an_error_is_one_line(
    error: Exception,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_launched", lambda: True)
    with pytest.raises(SystemExit) as end:
        cli._run()  # pyright: ignore[reportPrivateUsage]
    assert end.value.code == code
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


def test_what_only_this_process_knows_is_not_said_by_another() -> None:
    assert said_by_another(caused())
    assert not said_by_another(RecipeError("a batch of 1"))
