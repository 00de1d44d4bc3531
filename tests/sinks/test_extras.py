"""The command that installs an extra, wherever dynarank came from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest

from dynarank.sinks import extras
from dynarank.sinks.extras import install_command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """As it is in an environment, not in a checkout; the origin is that of the mock."""
    monkeypatch.setattr(extras, "_PACKAGE", tmp_path / "site-packages" / "dynarank")
    found = Mock()
    monkeypatch.setattr(extras, "distribution", Mock(return_value=found))
    return found


def from_origin(found: Mock, **origin: object) -> list[str]:
    found.read_text.return_value = json.dumps(origin)
    return shlex.split(install_command("report"))


def test_a_checkout_is_installed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "a folder"
    package = root / "src" / "dynarank"
    package.mkdir(parents=True)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "_PACKAGE", package)
    assert shlex.split(install_command("text")) == ["pip", "install", "-e", f"{root}[text]"]
    monkeypatch.chdir(root)
    assert install_command("text") == "pip install -e '.[text]'"


def test_what_came_from_somewhere_comes_from_there_again(installed: Mock) -> None:
    assert from_origin(installed, url="file:///a%20b/dynarank", dir_info={}) == [
        "pip", "install", "/a b/dynarank[report]",
    ]  # fmt: skip
    wheel = "file:///tmp/dynarank-1-py3-none-any.whl"
    assert from_origin(installed, url=wheel, archive_info={})[-1] == f"{wheel[7:]}[report]"
    git = {"vcs": "git", "commit_id": "abc"}
    assert from_origin(installed, url="https://host/d.git", vcs_info=git)[-1] == (
        "dynarank[report] @ git+https://host/d.git@abc"
    )


@pytest.mark.parametrize("text", [None, "", "{", "{}"])
def test_all_else_comes_from_the_index(text: str | None, installed: Mock) -> None:
    installed.read_text.return_value = text
    assert install_command("report") == "pip install 'dynarank[report]'"
