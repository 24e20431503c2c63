"""`speck up`, `status`, `logs` and `down`: the stack of servers on this machine."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from infra.stack import Stack
    from infra.stack_lifecycle import ServiceState

NUM_LINES = 40
FOLLOW_EVERY_S = 0.5


class NoStack(RuntimeError):
    """There is no stack in this home, or no such service in it."""


def stack_commands(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (up, status, logs, down):
        app.command()(command)


def up() -> None:
    """Start the stack on this machine, or what of it is down.

    It is Prefect's server and a worker, MLflow, an S3 server, Ray's head and a second node, and PostgreSQL where that
    is installed, else SQLite.
    """
    from flows.settings import REPO, Settings
    from infra.stack import stack_home
    from infra.stack_lifecycle import states
    from infra.stack_lifecycle import up as start
    from training.cluster import token_file

    home, began = stack_home(Settings().home), time.monotonic()
    token_file(home)
    stack = start(home, REPO, typer.echo)
    typer.echo(f"the stack is up, after {time.monotonic() - began:.0f} s")
    _print_table(states(stack))
    typer.echo(f"\npoint a shell at it:    source {home / 'stack.env'}")
    typer.echo(f"sign in to its pages:   user and password are in {home / 'credentials.json'}")
    typer.echo("then:                   prefect deployment run train-all/default")


def status(as_json: JsonOption = False) -> None:
    """Show the stack's services; exit code 1 if one of them does not work."""
    from dataclasses import asdict

    from infra.stack_lifecycle import states

    found = states(_stack())
    if as_json:
        print_json([asdict(state) for state in found])
    else:
        _print_table(found)
    if any(state.fault is not None for state in found):
        raise typer.Exit(1)


def logs(
    service: Annotated[str | None, typer.Argument(help="One of those that `speck status` shows; without, all.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is written from now on.")] = False,
) -> None:
    """Print the last lines of the stack's logs."""
    stack = _stack()
    if service is not None and service not in stack.services:
        from data.card import did_you_mean

        hint = did_you_mean(service, stack.services)
        raise NoStack(f"{service!r} is no service of the stack.{hint} Known: {', '.join(stack.services)}")
    paths = [stack.logs / f"{name}.log" for name in ([service] if service else stack.services)]
    tails = {path.stem: _Tail(path) for path in paths}
    for name, tail in tails.items():
        _print_lines(tail.read()[-NUM_LINES:], "" if service else name)
    while follow:
        time.sleep(FOLLOW_EVERY_S)
        for name, tail in tails.items():
            _print_lines(tail.read(), "" if service else name)


def down() -> None:
    """Stop the stack. Its data stay, and `speck up` goes on with them; flow runs under way are marked as crashed."""
    from infra.stack_lifecycle import down as stop

    typer.echo("the stack is down; its data stay" if stop(_stack(), typer.echo) else "the stack was not running")


def _stack() -> Stack:
    from flows.settings import REPO, Settings
    from infra.stack import open_stack, stack_home

    home = stack_home(Settings().home)
    stack = open_stack(home, REPO)
    if stack is None:
        raise NoStack(f"there is no stack in {home}. `speck up` makes one; SPECK_HOME says where")
    return stack


def _print_table(states: list[ServiceState]) -> None:
    typer.echo(f"{'service':9}  {'state':26}  {'pid':>7}  {'uptime':>8}  address")
    for state in states:
        pid = "" if state.pid is None else state.pid
        uptime = "" if state.uptime_s is None else _duration(state.uptime_s)
        typer.echo(f"{state.name:9}  {state.fault or 'works':26}  {pid:>7}  {uptime:>8}  {state.url}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _print_lines(lines: list[str], name: str) -> None:
    for line in lines:
        typer.echo(f"{name:9} {line}" if name else line)


class _Tail:
    """A log that is read on as it grows, also after the supervisor has begun it anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, ""

    def read(self) -> list[str]:
        """Whole lines that came since the last time."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            size = file.seek(0, 2)
            if size < self._offset:
                self._offset, self._rest = 0, ""
            file.seek(self._offset)
            content = file.read()
            self._offset += len(content)
            *lines, self._rest = (self._rest + content.decode(errors="replace")).split("\n")
            return lines
        return []
