"""Whether policies allow a request, by AWS's rules: an explicit Deny wins, then an Allow, else no."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def allowed(policies: Iterable[Mapping[str, Any]], action: str, resource: str, **context: str) -> bool:
    """`context` holds the condition keys that the request has, `:` and `-` written as `__` and `_`."""
    present = {name.replace("__", ":").replace("_", "-").lower(): value for name, value in context.items()}
    effects = {
        statement["Effect"]
        for policy in policies
        for statement in policy["Statement"]
        if _any(statement["Action"], action, fold=True)
        and _any(statement["Resource"], resource)
        and all(_holds(*each, present) for each in statement.get("Condition", {}).items())
    }
    assert effects <= {"Allow", "Deny"}
    return effects == {"Allow"}


def _any(patterns: str | list[str], text: str, *, fold: bool = False) -> bool:
    return any(
        _matches(pattern, text, fold=fold) for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    )


def _matches(pattern: str, text: str, *, fold: bool = False) -> bool:
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, text, re.DOTALL | (re.IGNORECASE if fold else 0)) is not None


def _holds(operator: str, tests: Mapping[str, str | list[str]], present: Mapping[str, str]) -> bool:
    for name, wanted in tests.items():
        value = present.get(name.lower())
        if operator == "Null":
            if (value is None) != (wanted == "true"):
                return False
        elif operator == "Bool":
            # A key that the request lacks fulfils no condition on its value.
            if value is None or value.lower() != wanted:
                return False
        elif operator in ("StringLike", "StringLikeIfExists"):
            if not (operator.endswith("IfExists") if value is None else _any(wanted, value)):
                return False
        else:
            raise AssertionError(f"{operator} is not known here")
    return True
