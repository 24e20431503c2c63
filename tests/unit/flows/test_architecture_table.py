from __future__ import annotations

from pathlib import Path

import pytest

import models
from flows.architecture_table import NUM_CLASSES, PUBLISHED, as_markdown, describe

DOCUMENT = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text()


@pytest.mark.parametrize("name", ["yolox-nano", "yolov8-n", "csf-net-n", "gf-fpn-n", "foreground-probe-n", "fpn-l"])
def test_the_document_says_what_is_counted(name: str) -> None:
    assert as_markdown([describe(name)]).splitlines()[2] in DOCUMENT.splitlines()


def test_the_document_lists_every_architecture_once() -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in rows[2:]] == list(models.ARCHITECTURES)


def test_published_figures_and_class_counts_are_of_architectures_that_exist() -> None:
    assert PUBLISHED.keys() <= models.ARCHITECTURES.keys()
    assert all(any(name.startswith(family) for name in models.ARCHITECTURES) for family in NUM_CLASSES)


@pytest.mark.soak
def test_the_document_has_the_whole_table() -> None:
    assert as_markdown([describe(name) for name in models.ARCHITECTURES]) in DOCUMENT
