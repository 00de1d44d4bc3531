"""Derive every figure in README.md and docs/ from the records again; fail where one differs.

    python -m benchmarks.verify
    python -m benchmarks.verify --page docs/scale.md

What a page has between `<!-- begin NAME -->` and `<!-- end -->` must be what the records give for
NAME. `benchmarks/claims/` has a module for each page with other figures. What its `claims()`
derives from the records must stand in the page, and no figure may be left that neither a claim nor
`SETTINGS` explains. A figure is a decimal number, one with a thousands comma, an exponent, k, M, ±,
%, x, times, points or a unit of time, memory or work, a count such as 3 of 5 or n = 5, or a number
alone in a cell of a table. On the pages with the main results it is any number, in words too, and
any word that compares, such as better, fewer or none. Code and link targets are left out. Pictures
must be drawn from the records as they are. Each fault is one line that ends with the way out; the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType

from benchmarks.claims.words import IN_WORDS, WORD
from benchmarks.training.harness import evidence
from benchmarks.training.harness.experiment import broken, names

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "docs" / "images" / "demo.svg"
_DRAW = "docs/images/demo.py"
_WRITE = "python -m benchmarks.training write"
UNIT = r"""
    (?: \s? (?: [nuµm]?s | min | h | [KMG]i?B | kB | [KMGTP]?FLOPs? | k?[JW] )\b
      | \s (?: times | points? | pp | percent | per\scent | standard\s(?:errors?|deviations?)
             | (?:micro|milli)?seconds? | minutes? | hours? | bytes
             | thousand | [mb]illion )\b )
"""
FIGURE = re.compile(
    rf"""
    (?<![\w.^]) (?!\d{{4}}\.\d{{5}}\b) (?:  # not arXiv's numbers
        (?: \d{{1,3}}(?:,\d{{3}})+(?:\.\d+)? | \d*\.\d+ ) (?: [x×](?!\w) | \s?% )?
      | \d+ (?: [x×](?!\w) | \s[x×]\s(?:as|fewer|less|more|faster|slower)\b | [-\s]fold
          | \s?% | (?=\s?±)
          | [kM](?![\w/]) | e-?\d+ | \sof\s\d+ (?![\w.,]\d)
          | {UNIT} )
    )
    | \bfactor\sof\s\d+ (?![\d.])
    | (?<=\bn\s=\s) \d+
    | ±\s? \d*\.?\d+
    | (?<=\|)[ ]* [-+]?\d+ [ ]*(?=\|)
    """,
    re.VERBOSE,
)
TELLING = re.compile(f"{FIGURE.pattern}|(?i:{WORD.pattern})", re.VERBOSE)
NOT_TEXT = re.compile(r"^ *```.*?^ *```|`(?:(?!\n\n)[^`])+`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
BEFORE = r"(?<![\w.+−-])(?<!\d,)"  # a figure at the start of a piece is whole
AFTER = rf"(?!\w|[.,]\d|\s?[%×x](?!\w)|{UNIT})"
NUMBER = re.compile(r"\d[\d,]*(?:\\\.\d+)?|\\\.\d+")  # in an escaped text


def pages() -> list[str]:
    """Return the pages, as paths from the root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def module_name(page: str) -> str:
    """Return the name of the module with a page's claims."""
    words = page.removeprefix("docs/").removesuffix(".md").lower()
    return "benchmarks.claims." + words.replace("/", "_").replace("-", "_")


def module_path(page: str) -> str:
    """Return the path of the module with a page's claims."""
    return module_name(page).replace(".", "/") + ".py"


class Page:
    """A page: its text, and what of it is not explained yet."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.rest = name, text, text
        self.figure = TELLING if name in IN_WORDS else FIGURE
        self.derived = self.set = self.written = 0  # figures
        for found in NOT_TEXT.finditer(text):
            self.take_out(found.span())

    def take_out(self, span: tuple[int, int]) -> None:
        """Blank a part of what is left."""
        blank = re.sub(r"[^\n]", " ", self.rest[slice(*span)])
        self.rest = self.rest[: span[0]] + blank + self.rest[span[1] :]

    def places(self, piece: str, any_number: bool = False) -> list[tuple[int, int]]:
        """Return where a piece stands, whatever its line breaks and, if so asked, its numbers."""
        found = r"\s+".join(map(re.escape, piece.split()))
        if any_number:
            found = NUMBER.sub(lambda _: r"(?:[\d.,]*\d)", found)
        start = BEFORE if piece[0] in "0123456789." else ""
        end = AFTER if piece[-1].isdigit() else r"(?![\d%]|[.,]\d)"
        whole = re.compile(f"{start}(?-x:{found}){end}", re.VERBOSE)
        return [one.span() for one in whole.finditer(self.text)]

    def explain(self, pieces: Iterable[str]) -> tuple[int, list[str]]:
        """Take the pieces out of what is left.

        Returns:
            How many figures they explain, and the pieces that do not stand in the page.
        """
        count, found = 0, {piece: self.places(piece) for piece in pieces}
        for span in chain.from_iterable(found.values()):
            count += len(self.figure.findall(self.rest[slice(*span)]))
            self.take_out(span)
        return count, [piece for piece, places in found.items() if not places]

    def differing(self, piece: str) -> str:
        """Say what the page has instead of a claim, and take that out."""
        for span in self.places(piece, any_number=True):
            if self.figure.search(self.rest[slice(*span)]):
                self.take_out(span)
                return f"{self.at(span[0])}: the page has {flat(self.text[slice(*span)])!r}, but"
        return f"{self.name}: the page does not have what"

    def at(self, position: int) -> str:
        """Return the page and the line of a position."""
        return f"{self.name}:{self.text.count(chr(10), 0, position) + 1}"

    def left(self) -> Iterator[str]:
        """Yield a fault for each line with figures that nothing explains."""
        for place, group in groupby(
            self.figure.finditer(self.rest), lambda one: self.at(one.start())
        ):
            found = list(group)
            around = flat(self.text[max(0, found[0].start() - 30) : found[-1].end() + 30])
            figures = ", ".join(flat(one[0]) for one in found)
            yield (
                f"{place}: no record is named for {figures} in '...{around}...'; "
                f"derive it in {module_path(self.name)}, or take it out of the page"
            )


def flat(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def faults(page: Page, claims: Sequence[str], settings: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a page, given its claims and settings."""
    page.derived, absent = page.explain(claims)
    page.set, lost = page.explain(settings)
    for piece in lost:
        yield f"{page.name}: the page does not have the setting {piece!r}; correct one of the two"
    for piece in absent:
        yield f"{page.differing(piece)} the records give {piece!r}; correct the page, or its claim"
    yield from page.left()


def typed_in(source: str) -> Iterator[str]:
    """Yield the texts of a claims module in which a figure is typed, not derived.

    A text without any figure is typed whole: then its words are, unless `says` has their proof.
    """
    nodes = list(ast.walk(ast.parse(source)))
    formats = {id(node.format_spec) for node in nodes if isinstance(node, ast.FormattedValue)}
    for node in nodes:
        parts = [] if id(node) in formats else _parts(node)
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        pattern = TELLING if isinstance(node, ast.Yield) else FIGURE
        yield from (text for text in texts if isinstance(text, str) and pattern.search(text))


def _parts(node: ast.AST) -> list[ast.expr | None]:
    """Return the parts of the text that a piece of code writes: a format, a claim, a call."""
    if isinstance(node, ast.JoinedStr):
        return [*node.values]
    if isinstance(node, ast.Yield):
        return [node.value]
    says = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "says"
    return node.args[:1] if says else []


def differing_blocks(page: Page) -> Iterator[str]:
    """Take the blocks out of what is left; yield a fault for each that the records do not give."""
    for found in evidence.BLOCK.finditer(page.text):
        page.written += len(FIGURE.findall(page.rest[slice(*found.span())]))
        page.take_out(found.span())
        if found["text"] != blocks().get(name := found["name"]):
            yield f"{page.at(found.start())}: the records give another block {name}; {_WRITE}"


@cache
def blocks() -> dict[str, str]:
    """Return all blocks as the records give them; read once."""
    return evidence.blocks()


def settings(module: ModuleType) -> tuple[str, ...]:
    """Return the pieces of a page that tell no result."""
    return (*module.SETTINGS, *getattr(module, "NO_RESULTS", ()))


def check_module(page: Page, module: ModuleType) -> Iterator[str]:
    """Yield what is wrong with a page that has a module of claims."""
    path = module_path(page.name)
    try:
        claims = list(getattr(module, "claims", list)())
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame for frame in frames if frame.name != "says"][-1]
        yield (
            f"{page.name}: what it says in words does not follow from the records: "
            f"{str(error) or line.line!r} in {path}, line {line.lineno}; correct the page, then "
            "the claim"
        )
        return
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        yield f"{page.name}: {path} cannot derive its figures ({why}); restore the records"
        return
    for piece in typed_in(inspect.getsource(module)):
        yield f"{path}: a figure is typed into {piece!r}; derive it, or name it in SETTINGS"
    yield from faults(page, claims, settings(module))


def check(name: str) -> tuple[Page, list[str]]:
    """Return a page, and what is wrong with it."""
    page = Page(name, (ROOT / name).read_text(encoding="utf-8"))
    if importlib.util.find_spec(module_name(name)) is None:
        return page, [*differing_blocks(page), *page.left()]
    module = importlib.import_module(module_name(name))
    return page, [*differing_blocks(page), *check_module(page, module)]


def without_page() -> Iterator[str]:
    """Yield a fault for each module whose page is not there."""
    for path in sorted((Path(__file__).parent / "claims").glob("*.py")):
        module = importlib.import_module(f"benchmarks.claims.{path.stem}")
        page = getattr(module, "PAGE", None)
        if page and (page not in pages() or module_name(page) != module.__name__):
            yield f"benchmarks/claims/{path.name}: its page is not {page}; rename or remove it"


def without_place() -> Iterator[str]:
    """Yield a fault for each block that no page has."""
    for name in evidence.unplaced(blocks()):
        yield f"docs/: no page has a block {name}; write <!-- begin {name} --> and <!-- end -->"


def stale_pictures() -> Iterator[str]:
    """Yield a fault for each picture that is not drawn from the records."""
    for name in evidence.stale_pictures():
        path = (evidence.PICTURES / name).relative_to(evidence.ROOT)
        yield f"{path}: changed by hand, or of other records than there are; {_WRITE}"
    picture = runpy.run_path(str(ROOT / _DRAW))["picture"]()
    if picture != DEMO.read_text(encoding="utf-8"):
        yield f"{DEMO.name}: changed by hand, or of other records than there are; python {_DRAW}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the pages; print the faults, or one line if there are none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--page", choices=pages(), metavar="PAGE", help="check this page alone")
    page = parser.parse_args(arguments).page
    if unusable := broken(names()):
        print("\n".join(f"{why}; mend it or take it out" for why in unusable.values()))
        return 1
    checked = [check(name) for name in ([page] if page else pages())]
    wrong = [*chain.from_iterable(found for _, found in checked)]
    wrong += [] if page else [*without_page(), *without_place(), *stale_pictures()]
    if wrong:
        print("\n".join(wrong))
        return 1
    derived = [found for one, _ in checked if (found := one.derived + one.written)]
    number = f"{len(derived)} page{'' if len(derived) == 1 else 's'}"
    settings = sum(one.set for one, _ in checked)
    print(f"{sum(derived)} figures on {number} agree with the records; {settings} are settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
