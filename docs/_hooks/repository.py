"""Links out of docs/ work on the site: what they lead to becomes a page or a file of the site.

The README is the home page. Each document may link to any file of the repository by its relative
path, as it does in the repository; the same link is rewritten for the site here.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAMED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"""(\]\(|(?:src|srcset|href)=")([^)\s":#]+)""")

sources: dict[str, Path] = {}  # where the text of each page is, by the page's place in the site


def place(path: Path) -> str:
    """Where a file or folder of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return place(path / "README.md")
    if name in NAMED:
        return NAMED[name]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{name}" + (".md" if path.suffix == ".py" else "")


def targets(text: str, folder: Path) -> Iterator[Path]:
    """The files and folders of the repository that a text links to."""
    for _, link in LINK.findall(text):
        path = (folder / link).resolve()
        if path.exists() and path.is_relative_to(ROOT):
            yield path


def text_of(path: Path) -> str | None:
    """The page that shows a file or folder; None for data, which is copied as it is."""
    title = f"# `{path.relative_to(ROOT).as_posix()}`\n\n"
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return f"{title}````python\n{path.read_text(encoding='utf-8')}````\n"
    if path.is_dir():
        if (readme := path / "README.md").exists():
            return readme.read_text(encoding="utf-8")
        files = [one for one in sorted(path.iterdir()) if one.is_file()]
        return title + "".join(f"- [{one.name}]({one.name}){about(one)}\n" for one in files)
    return None


def about(path: Path) -> str:
    """The first line of a Python file's docstring, after a colon."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    docstring = ast.get_docstring(ast.parse(text))
    return f": {docstring.splitlines()[0]}" if docstring else ""


def generated(path: Path, config: MkDocsConfig) -> File:
    """A file of the site from one outside docs/."""
    text = text_of(path)
    if text is None:
        return File.generated(config, place(path), abs_src_path=str(path))
    sources[place(path)] = path / "README.md" if path.is_dir() else path
    return File.generated(config, place(path), content=text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that are named, or that a page links to, directly or not."""
    sources.clear()
    for page in files.documentation_pages():
        if page.abs_src_path is not None:
            sources[page.src_uri] = Path(page.abs_src_path)
    waiting = [ROOT / name for name in NAMED]
    for source in sources.values():
        waiting += targets(source.read_text(encoding="utf-8"), source.parent)
    while waiting:
        path = waiting.pop()
        if path.is_relative_to(DOCS) or place(path) in files.src_uris:
            continue
        files.append(generated(path, config))
        waiting += targets(text_of(path) or "", path if path.is_dir() else path.parent)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link to where its target is in the site."""
    source = sources.get(page.file.src_uri)
    if source is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = (source.parent / match[2]).resolve()
        if not (path.exists() and path.is_relative_to(ROOT)):
            return match[0]
        return match[1] + posixpath.relpath(place(path), here or ".")

    return LINK.sub(moved, markdown)
