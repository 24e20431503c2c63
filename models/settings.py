"""Settings of an architecture: named, typed, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UnknownArchitecture(LookupError):
    """No architecture of that name."""


class UnknownSetting(LookupError):
    """The architecture has no setting of that name."""


class InvalidSetting(ValueError):
    """A setting has a value outside its rule."""


def unknown_message(name: str, known: Iterable[str]) -> str:
    """Return what is unknown, the nearest known name if one is near, and all known names."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name!r} is not known.{hint} Known: {', '.join(known)}."


def apply_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return the config dataclass with `settings` in place of its own values.

    Raises:
        UnknownSetting: a name is not a field of the config.
        InvalidSetting: a value is not of the field's type, or breaks a rule of the config itself.
    """
    types = get_type_hints(type(config))
    for name in settings:
        if name not in types:
            raise UnknownSetting(unknown_message(name, types))
    checked = {name: _checked(name, value, types[name]) for name, value in settings.items()}
    return dataclasses.replace(config, **checked)


def _checked(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as `expected`: a plain type, a Literal, `tuple[T, ...]` (a list will do) or `T | None`."""
    kind, arguments = get_origin(expected), get_args(expected)
    if kind is UnionType:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _checked(name, value, inner)
    if kind is tuple:
        # JSON and YAML know no tuples.
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(name, value, f"list of {arguments[0].__name__}")
        return tuple(_checked(f"{name}[{index}]", item, arguments[0]) for index, item in enumerate(value))
    if kind is Literal:
        if value not in arguments:
            raise InvalidSetting(f"{name}={value!r} must be one of {list(arguments)}. Choose one of them.")
        return value
    # An integer is a fine float; a bool, though an int to Python, is neither.
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise _wrong_type(name, value, expected.__name__)
    return float(value) if expected is float else value


def _wrong_type(name: str, value: Any, expected: str) -> InvalidSetting:
    kind = type(value).__name__
    return InvalidSetting(f"{name}={value!r} must be of type {expected}, not {kind}. Give a {expected}.")
