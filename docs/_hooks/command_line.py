"""The page of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dynarank.cli import app

HEAD = """# Command line

`dynarank COMMAND --help` says the same in the terminal. Exit codes: 0 done (now or before), 1 a
run failed (it diverged, the disk is full), 2 invalid request, 130 interrupted by Ctrl-C and 143 by
SIGTERM; a second signal exits at once.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    group = typer.main.get_command(app)
    files.append(File.generated(config, "command-line.md", content=page(group)))
    return files


def page(group: Any) -> str:
    """Each command with its arguments and options, in Markdown."""
    root = group.context_class(group, info_name="dynarank")
    return HEAD + "".join(
        section(*resolved(group, root, name), root) for name in group.list_commands(root)
    )


def resolved(group: Any, root: Any, name: str) -> tuple[str, Any]:
    """A command's name and the command itself, imported by now."""
    return group.resolve_command(root, [name])[:2]


def section(name: str, command: Any, root: Any) -> str:
    """One command: its usage, its help and a list of what it takes."""
    context = command.context_class(command, info_name=name, parent=root)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    about = (command.help or "").split("\f")[0]
    takes = "".join(parameters(command, context))
    return f"\n## {name}\n\n```\n{usage}\n```\n\n{about}\n\n{takes}"


def parameters(command: Any, context: Any) -> Iterator[str]:
    """A line of Markdown for each argument and option."""
    for one in command.get_params(context):
        if getattr(one, "hidden", False) or one.name == "help":
            continue
        names = one.metavar or one.name
        if one.param_type_name == "option":
            names = ", ".join([*one.opts, *one.secondary_opts])
            names += f" {one.metavar}" if one.metavar else ""
        record = one.get_help_record(context)
        text = (record and record[1]) or getattr(one, "help", None) or ""
        yield f"- `{names}`: {' '.join(text.split())}\n"
