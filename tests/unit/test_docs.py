"""What the manuals print: commands that exist, with options that they have, and links that lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app

ROOT = Path(__file__).parents[2]
# Typer brings its own copy of click.
UsageError: Any = typer.BadParameter.__base__
MANUALS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def printed_commands(text: str) -> list[list[str]]:
    """The words after `speck` in its `sh` blocks; `data push | pull` are two commands."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        commands = re.sub(r"<<'(\w+)'.*?^\1$", "", block, flags=re.S | re.M).replace("\\\n", " ")
        for line in commands.splitlines():
            if line.startswith("speck "):
                # Of a `|` to another program there is none after `speck`.
                first, *others = _alternatives(line)
                group = first[:1] if first[0] == "data" else []
                found += [first, *(group + other for other in others)]
    return found


def _alternatives(line: str) -> list[list[str]]:
    """What stands between `|`, up to what is the shell's: `>`, `&`, `||`."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in [*words][1:]:
        if word == "|":
            found.append([])
        elif not set(word) <= set("<>&|;()"):
            found[-1].append(word)
        else:
            break
    return found


COMMANDS = [(path, words) for path in MANUALS for words in printed_commands(path.read_text())]


def problems(words: list[str]) -> list[str]:
    """What is wrong with a command: that there is none, or not with these options and so many arguments."""
    command: Any = typer.main.get_command(app)
    context, rest = command.context_class(command, info_name="speck"), words
    try:
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, rest)
            context = command.context_class(command, parent=context, info_name=name)
        values, unused, _ = command.make_parser(context).parse_args(list(rest))
    except UsageError as error:
        return [str(error)]
    lacking = [p.name for p in command.params if p.required and values.get(p.name) in (None, ())]
    return [f"unused: {value}" for value in unused] + [f"lacking: {name}" for name in lacking]


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS], ids=[f"{path.stem}: {' '.join(words)}" for path, words in COMMANDS]
)
def test_a_printed_command_exists(words: list[str]) -> None:
    assert problems(words) == []


@pytest.mark.parametrize(
    "words", [["trainall"], ["train-all", "--dataset", "x"], ["sync", "--spec"], ["history"], ["gc", "one"]]
)
def test_a_wrong_command_is_found(words: list[str]) -> None:
    assert len(problems(words)) == 1


@pytest.mark.parametrize("path", MANUALS, ids=[str(path.relative_to(ROOT)) for path in MANUALS])
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
