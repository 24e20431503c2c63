"""`speck doctor`: what is wrong on this machine, with the remedy."""

from __future__ import annotations

import typer

from flows.output import JsonOption, print_json


def doctor(as_json: JsonOption = False) -> None:
    """Check services, credentials, clocks, disk, packages, orphans and the DVC remote; exit code 1 if one fails."""
    from dataclasses import asdict

    from flows.doctor import examine
    from flows.settings import REPO, Settings

    checks = []
    for check in examine(Settings().home, REPO):
        checks.append(check)
        if not as_json:
            typer.echo(f"{check.level:4}  {check.what}: {check.found}")
            if check.remedy:
                typer.echo(f"      {check.remedy}")
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.level == "FAIL" for check in checks):
        raise typer.Exit(1)
