"""What the documents show works: code, recipes, commands, links, names of tests."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from documents import DOCUMENTS, ROOT, blocks, commands, name, scripts, with_blocks
from warm_python import run

from dynarank.cli import app
from dynarank.train.recipes import Recipe, recipe_names

# Lightning 2.6 uses an old name of torch's, and wants workers for the smallest data.
WARNED = [
    "error", "ignore:`isinstance(treespec, LeafSpec)`", "ignore:The 'train_dataloader' does not",
]  # fmt: skip
GROUP = typer.main.get_command(app)


@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_the_code_runs(page: Path, tmp_path: Path) -> None:
    """Each block alone, or all in a row where the page says that they follow one another."""
    (tmp_path / page.stem).mkdir()
    for number, code in enumerate(scripts(page)):
        script = tmp_path / page.stem / f"block{number}.py"
        script.write_text(code, encoding="utf-8")
        done = run([*(word for w in WARNED for word in ("-W", w)), script], cwd=script.parent)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", with_blocks("toml"), ids=name)
def test_a_recipe_is_one(page: Path) -> None:
    for text in blocks(page, "toml"):
        assert Recipe(name="page", **tomllib.loads(text)).data


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if commands(page)], ids=name)
def test_a_command_has_the_options_and_the_recipe_that_are_shown(page: Path) -> None:
    for line in commands(page):
        check_command(shlex.split(line, comments=True)[1:])


def check_command(words: list[str]) -> None:
    """Raise an error for an unknown command, option or recipe."""
    root = GROUP.context_class(GROUP, info_name="dynarank")
    if words[0].isupper() or words[0].startswith("-"):
        GROUP.make_parser(root).parse_args([w for w in words if w.startswith("-")])
        return
    _, command, rest = GROUP.resolve_command(root, words)
    context = command.context_class(command, parent=root)
    given, _, _ = command.make_parser(context).parse_args(rest)
    recipe = given.get("recipe")
    if isinstance(recipe, str) and not recipe.isupper() and not re.search(r"[.:]", recipe):
        assert recipe in recipe_names(), recipe


@pytest.mark.parametrize("line", ["trian digits", "train digits --sched x", "--versoin", "train x"])
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"trian|--sched|--versoin|x"):
        check_command(line.split())


def test_documents_name_tests_that_exist() -> None:
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for path in DOCUMENTS:
        if path.parent.name == "how-to":  # these name the files that a reader is to write
            continue
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"test_\w+\.py", text)) <= names, path
        for place in re.findall(r"tests/[\w/]+\.py", text):
            assert (ROOT / place).exists(), f"{path}: {place}"


def test_no_document_holds_a_placeholder_or_a_dead_link() -> None:
    assert len(DOCUMENTS) >= 6
    # Names that a page may speak of, since a module defines or reads them.
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    constants = set(re.findall(r"^([A-Z_]+)(?:: .*)? = ", code, re.M))
    constants |= set(re.findall(r"\"([A-Z]+(?:_[A-Z]+)+)\"", code))  # variables of torchrun's
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        names = set(re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b|^RESULTS$|TODO", text, re.M))
        assert not names - constants, path
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_errors_of_the_faq_are_those_of_the_library() -> None:
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs/faq.md").read_text("utf-8"), re.M)
    own = [one for one in headings if "state_dict" not in one]  # that one is torch's
    assert len(own) >= 10
    for part in (part for one in own for part in one.split(" ... ")):
        assert part in code or part.rpartition(" ")[0] in code, part
