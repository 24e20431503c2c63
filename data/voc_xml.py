"""One Pascal VOC annotation file: from XML to text fields, with the line on which each object begins."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax import SAXParseException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl, Locator

from defusedxml import DefusedXmlException
from defusedxml.sax import parseString

from data.label_files import UnreadableFile, read_bytes

SIDES = ("xmin", "ymin", "xmax", "ymax")
IMAGE_FIELDS = frozenset({"filename", "size/width", "size/height"})
OBJECT_FIELDS = frozenset({"name", "difficult", *(f"bndbox/{side}" for side in SIDES)})
_MAX_DEPTH = 4  # annotation/object/bndbox/xmin


class UnreadableXml(ValueError):
    """A file that is no VOC annotation; the message is the rule it breaks, `line` and `column` the place if known."""

    def __init__(self, rule: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(rule)
        self.line, self.column = line, column


class VocObject(NamedTuple):
    """One `<object>`: those of OBJECT_FIELDS that it has; fields of its `<part>`s are not among them."""

    line: int
    fields: dict[str, str]


class VocAnnotation(NamedTuple):
    """One file: those of IMAGE_FIELDS that it has, and its objects in the file's order."""

    fields: dict[str, str]
    objects: list[VocObject]


def read_annotation(path: Path) -> VocAnnotation:
    """Read a file without ever following what it refers to.

    Raises UnreadableXml when it is missing, is not well-formed XML, declares a document type (and with it entities),
    has another root than `<annotation>`, or has one of the fields twice.
    """
    handler = _Handler()
    try:
        parseString(read_bytes(path), handler, forbid_dtd=True)
    except UnreadableFile as error:
        raise UnreadableXml(str(error)) from error
    except SAXParseException as error:
        column = error.getColumnNumber()
        place = error.getLineNumber(), None if column is None else column + 1
        raise UnreadableXml(f"not XML: {error.getMessage()}", *place) from error
    except DefusedXmlException as error:
        raise UnreadableXml("document types and entities are not allowed: they serve attacks, not labels") from error
    except UnreadableXml:
        raise
    except (ValueError, LookupError) as error:
        raise UnreadableXml(f"not XML: {error}") from error
    return VocAnnotation(handler.fields, handler.objects)


class _Handler(ContentHandler):
    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self.objects: list[VocObject] = []
        self._path: list[str] = []
        self._text: list[str] = []
        self._locator: Locator | None = None

    def setDocumentLocator(self, locator: Locator) -> None:  # noqa: N802
        self._locator = locator

    def startElement(self, name: str, attrs: AttributesImpl) -> None:  # noqa: ARG002, N802
        self._path.append(name)
        self._text = []
        if len(self._path) == 1 and name != "annotation":
            raise UnreadableXml(f"the root must be <annotation>, found <{name}>", self._line())
        if len(self._path) == 2 and name == "object":
            self.objects.append(VocObject(self._line(), {}))

    def characters(self, content: str) -> None:
        self._text.append(content)

    def endElement(self, name: str) -> None:  # noqa: ARG002, N802
        if len(self._path) <= _MAX_DEPTH:
            is_object = self._path[1:2] == ["object"]
            key = "/".join(self._path[2 if is_object else 1 :])
            if key in (OBJECT_FIELDS if is_object else IMAGE_FIELDS):
                fields = self.objects[-1].fields if is_object else self.fields
                if key in fields:
                    raise UnreadableXml(f"<{key}> occurs twice where there may be one", self._line())
                fields[key] = "".join(self._text).strip()
        self._path.pop()
        self._text = []

    def _line(self) -> int:
        line = self._locator.getLineNumber() if self._locator is not None else None
        return line or 1
