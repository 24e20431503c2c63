"""The architecture that docs/architectures.md adds, added as it says."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest

import models

PACKAGE = Path(models.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "architectures.md"


def test_the_worked_example_adds_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DOCUMENT.read_text().split("## Add one")[1]
    code = re.findall(r"```python\n# models/(\w+)\.py\n(.*?)```", section, re.DOTALL)
    ((name, source),) = code
    ((line, table),) = re.findall(r"`(from \.\w+ import \w+)`\) and add `\*(\w+)` to\s`ARCHITECTURES`", section)
    package = tmp_path / "models_with_one_more"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / f"{name}.py").write_text(source)
    listing = (package / "__init__.py").read_text()
    assert listing.count("*YOLOX_SIZES,") == 1
    listing = listing.replace("*YOLOX_SIZES,", f"*YOLOX_SIZES, *{table},")
    (package / "__init__.py").write_text(listing.replace("from .yolox", f"{line}\nfrom .yolox", 1))
    monkeypatch.syspath_prepend(tmp_path)
    grown = importlib.import_module(package.name)
    assert set(grown.ARCHITECTURES) - set(models.ARCHITECTURES) == {"yolox-s-ciou", "yolox-m-ciou"}
    detector = grown.build("yolox-s-ciou", num_classes=2, width=0.25)
    assert detector.box_loss is importlib.import_module(f"{package.name}.losses").complete_iou_loss
    assert "speck train yolox-s-ciou sample-aerial" in section
