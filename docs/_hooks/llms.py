"""``llms.txt``: each page with its first sentence, for language models, and the pages' Markdown."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

texts: dict[str, str] = {}  # the Markdown of each page, by its place
order: list[Page] = []


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Remember the order of the pages."""
    order[:] = nav.pages


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Remember a page's text, with the links of the site."""
    texts[page.file.src_uri] = markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Write ``llms.txt``, and the Markdown of each page of prose beside its HTML."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for page in order:
        text = texts[page.file.src_uri]
        url = page.url
        if "\n:::" not in text:
            url = str(Path(page.url).with_suffix(".md"))
            (site / url).write_text(text, encoding="utf-8")
        lines.append(f"- [{page.title}]({url}): {first_sentence(text)}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph that is prose."""
    paragraphs = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    prose = [one for one in paragraphs if one.strip() and not re.match(r"\s*[#<|!:\-]", one)]
    words = " ".join(prose[0].split()) if prose else ""
    return re.split(r"(?<=\.)\s", re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", words))[0]
