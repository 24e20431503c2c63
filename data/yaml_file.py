"""A YAML file of somebody else: a mapping of plain values, read without the language's dangerous parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data.label_files import UnreadableFile, read_bytes

# Ten thousand class names need less.
_MAX_BYTES = 2**18
_MAX_DEPTH = 20
# libyaml reads a dense file of that size in well under a second, PyYAML's own Python in five.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPEN = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSE = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class UnreadableYaml(UnreadableFile):
    """The message is the rule that is broken; `line` and `column`, from 1, the place where it is known."""

    def __init__(self, rule: str, mark: Any = None) -> None:
        super().__init__(rule)
        self.line = None if mark is None else mark.line + 1
        self.column = None if mark is None else mark.column + 1


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a mapping.

    Raises UnreadableYaml when the file cannot be read, is not YAML, has tags, anchors or aliases (with which a short
    file fills the memory), is nested deeper than labels need, or is no mapping.
    """
    try:
        text = read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
        _refuse_tricks(text)
        content = yaml.load(text, Loader=_LOADER)
    except UnreadableYaml:
        raise
    except UnreadableFile as error:
        raise UnreadableYaml(str(error)) from error
    except yaml.MarkedYAMLError as error:
        raise UnreadableYaml(f"not YAML: {error.problem}", error.problem_mark) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableYaml(f"not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableYaml("the top level must be a mapping of keys to values")
    return content


def _refuse_tricks(text: str) -> None:
    depth = 0
    for token in yaml.scan(text, Loader=_LOADER):
        depth += isinstance(token, _OPEN) - isinstance(token, _CLOSE)
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)):
            raise UnreadableYaml(
                "anchors, aliases and tags are not allowed: they serve attacks, not labels", token.start_mark
            )
        if depth > _MAX_DEPTH:
            raise UnreadableYaml(f"nested deeper than {_MAX_DEPTH} levels", token.start_mark)
