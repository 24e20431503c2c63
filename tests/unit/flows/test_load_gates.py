from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.card import CATALOG, card_names, load_card
from flows.load_gates import GATES, BadGates, load_gates, require_metrics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copyfile(GATES / "default.yaml", tmp_path / "default.yaml")
    return tmp_path


def test_a_dataset_without_gates_of_its_own_has_the_default_ones(tiny: Any, folder: Path) -> None:
    gates = load_gates(tiny.card, folder)
    assert (gates.rule, gates.margin, gates.confidence, gates.approval) == ("superior", None, 0.95, False)
    assert gates.protocol == "coco max_dets=100 ignore_rule=covered-half"
    assert not gates.needs_latency


@pytest.mark.parametrize("name", card_names(CATALOG))
def test_the_gates_in_the_repository_are_sound(name: str) -> None:
    assert load_gates(load_card(name)).protocol.startswith(load_card(name).protocol)


def test_every_file_of_gates_belongs_to_a_dataset() -> None:
    assert {path.stem for path in GATES.glob("*.yaml")} <= {"default", *card_names(CATALOG)}


def test_a_dataset_changes_keys_for_itself(tiny: Any, folder: Path) -> None:
    (folder / "tiny-squares.yaml").write_text(
        "rule: non_inferior\nmargin: 0.01\nclass_floors: {dark: 0.2}\nmax_dets: 500\n"
    )
    gates = load_gates(tiny.card, folder)
    assert (gates.rule, gates.margin, gates.class_floors) == ("non_inferior", 0.01, {"dark": 0.2})
    assert gates.protocol == "coco max_dets=500 ignore_rule=covered-half"
    assert gates.max_drop == {"coco/AP_small": 0.05}
    assert load_gates(tiny.card.model_copy(update={"name": "other"}), folder).rule == "superior"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_latency: 3", "key: 'max_latency' is not known. Did you mean 'max_latency_ms'?"),
        ("protocol: voc", "key: 'protocol' is not known."),
        ("class_floors: {drak: 0.1}", "class_floors: 'drak' is not known. Did you mean 'dark'? Known: bright, dark"),
        ("floors: {coco/AP: 1.5}", "floors.coco/AP: Input should be less than or equal to 1, got 1.5"),
        ("rule: better", "rule: Input should be 'superior' or 'non_inferior', got 'better'"),
        ("margin: 0.01", "rule non_inferior needs a margin, superior has none; got superior, 0.01"),
        ("confidence: .nan", "confidence: "),
        ("[1, 2]", "expected keys and values, found list"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_are_told_with_the_file_the_rule_and_the_nearest_name(
    tiny: Any, folder: Path, content: str, message: str
) -> None:
    (folder / "tiny-squares.yaml").write_text(content)
    with pytest.raises(BadGates) as error:
        load_gates(tiny.card, folder)
    assert "tiny-squares.yaml" in str(error.value)
    assert message in str(error.value)


def test_metrics_that_a_score_does_not_have_are_told_with_the_nearest(tiny: Any, folder: Path) -> None:
    (folder / "tiny-squares.yaml").write_text("metric: coco/ap\nfloors: {coco/AP_smal: 0.1}\n")
    gates = load_gates(tiny.card, folder)
    with pytest.raises(BadGates) as error:
        require_metrics(gates, {"coco/AP": 0.5, "coco/AP_small": None})
    assert "metric: 'coco/ap' is not known. Did you mean 'coco/AP'?" in str(error.value)
    assert "floors: 'coco/AP_smal' is not known. Did you mean 'coco/AP_small'?" in str(error.value)
