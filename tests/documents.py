"""The documents, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    """The page, as a test's name."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks in a language, in order."""
    return [code for kind, code in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def with_blocks(language: str) -> list[Path]:
    """The documents that have such a block."""
    return [page for page in DOCUMENTS if blocks(page, language)]


def scripts(page: Path) -> list[str]:
    """What is run of a page: each Python block alone, or all if it says that they go on."""
    code = blocks(page, "python")
    follow = re.search(r"follow\s+one\s+another", page.read_text("utf-8"))
    return ["\n".join(code)] if follow else code


def commands(page: Path) -> list[str]:
    """Each ``dynarank`` command line of a page, in a block or between backticks, whole."""
    text = page.read_text("utf-8")
    lines = "".join(code for kind, code in BLOCK.findall(text) if kind in ("", "bash", "console"))
    lines = re.sub(r"\\\n\s*", "", lines)
    found = re.findall(r"^(?:\$ |\S*/)?(dynarank \S.*)$", lines, re.MULTILINE)
    spans = re.findall(r"`(dynarank\s[^`]+)`", BLOCK.sub("", text))
    return [*found, *(" ".join(one.split()) for one in spans)]
