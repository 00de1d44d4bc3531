"""The documentation site builds strictly, is complete, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import typer
from documents import ROOT

import dynarank as dr
from dynarank.cli import app

pytest.importorskip("mkdocstrings")
LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc(?:set)?="([^"]+)"|<link ([^>]*)>')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are errors."""
    if built := os.environ.get("DYNARANK_SITE"):  # by `make docs`, just now
        return ROOT / built
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    """The text of each page."""
    return {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in site.rglob("*.html")}


def test_it_loads_nothing_from_elsewhere_and_misses_nothing(site: Path) -> None:
    for name, text in pages(site).items():
        for source, link in LOADED.findall(text):
            href = re.search(r'href="([^"]*)"', link)
            loaded = source or (href[1] if href else "")
            assert "//" not in loaded, f"{name}: {loaded}"
            if name != "404.html" and not loaded.startswith("data:"):
                there = (site / name).parent / re.split("[?#]", loaded)[0]
                assert there.exists(), f"{name}: {loaded}"
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        assert not re.search(r"""(?:@import|url\()\s*['"]?(?:https?:)?//""", text), style


def test_every_public_name_is_in_the_api_reference(site: Path) -> None:
    text = "".join(t for name, t in pages(site).items() if name.startswith("api/"))
    anchors = re.findall(r' id="dynarank\.(?:\w+\.)*(\w+)"', text)
    objects = [
        getattr(module, name)
        for module in (dr, dr.schedules, dr.rules, dr.regularizers)
        for name in module.__all__
    ]
    named = {one.__name__ for one in objects if isinstance(one, type | FunctionType)}
    assert len(named) > 60 and not named - {*anchors}


def test_the_reference_has_examples_and_no_roles(site: Path) -> None:
    for name, text in pages(site).items():
        if name.startswith("api/"):
            assert not re.search(r":(?:func|class|mod|meth|data):", text), name
            assert "<blockquote>" not in text, name  # an example that was read as a quotation


def test_every_command_and_option_is_on_the_page_of_the_command_line(site: Path) -> None:
    text = (site / "command-line.html").read_text("utf-8")
    group = typer.main.get_command(app)
    root = group.context_class(group, info_name="dynarank")
    for name in group.list_commands(root):
        _, command, _ = group.resolve_command(root, [name])
        assert f'id="{name}"' in text
        for one in command.params:
            assert one.opts[0] in text or one.hidden, (name, one.opts)


def test_llms_txt_lists_every_page(site: Path) -> None:
    text = (site / "llms.txt").read_text("utf-8")
    listed = re.findall(r"^- \[.+?\]\((\S+?)\): \S", text, re.MULTILINE)
    of_the_site = {n for n in pages(site) if not n.startswith("repository/") and n != "404.html"}
    assert {re.sub(r"\.md$", ".html", one) for one in listed} == of_the_site
    assert all((site / one).exists() for one in listed)


def test_links_out_of_the_documents_have_their_page(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    assert 'href="repository/benchmarks/training/results/2026-11-28-demo/' in home
    assert 'href="quickstart.html"' in home and 'src="images/demo.svg"' in home


def test_the_picture_is_that_of_the_recorded_runs() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "demo.py"))["picture"]()
    assert drawn == (ROOT / "docs" / "images" / "demo.svg").read_text("utf-8")
