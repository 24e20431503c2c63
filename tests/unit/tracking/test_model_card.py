from __future__ import annotations

from dataclasses import replace

from tracking.model_card import MAX_CLASSES, MAX_DESCRIPTION, Measured, ModelCard, as_description, as_markdown

CARD = ModelCard(
    name="drone-cars",
    dataset="Cars seen from 50 m.",
    licence="CC-BY-4.0",
    sources="a survey of 2024",
    data_version="d" * 32,
    num_images={"val": 40, "test": 60},
    classes=("car", "van", "bus"),
    architecture="yolox-nano",
    input="a JPEG.",
    recipe="12 epochs of sgd.",
    protocol="coco",
    rules="score >= 0.01",
    scores={"coco/AP": Measured(0.3125, 0.29, 0.34), "coco/AP_large": Measured(None)},
    interval="Intervals: 1000 samples.",
    ap_by_class={"car": 0.5, "van": 0.125, "bus": None},
    ap_by_size={"below 8 px": 0.0625, "8-16 px": None},
    recall_by_size={"below 8 px": (200, 50), "8-16 px": (0, 0)},
    errors={"class": (0.01, 5), "localisation": (0.2, 31)},
    threshold=0.375,
    precision=0.75,
    recall=0.625,
    latency="",
    provenance={"run key": "0123456789ab", "commit": "c" * 40},
)


def test_a_card_says_what_it_was_told() -> None:
    text = as_markdown(CARD)
    for told in (
        "# yolox-nano on drone-cars", "Finds car, van, bus.", "Cars seen from 50 m.", "(40 val, 60 test pictures)",
        "Licence: CC-BY-4.0", "| coco/AP | 0.312 | 0.290 to 0.340 |", "| coco/AP_large | - | - |",
        "at least 0.375", "precision 0.750 and recall 0.625", "AP is lowest for van (0.125); not known for bus",
        "errors of type localisation: 0.200, 31 of them", "| below 8 px | 200 | 25% | 0.062 |",
        "| 8-16 px (never tested) | 0 | - | - |", "run key: `0123456789ab`", "speck evaluate",
    ):  # fmt: skip
        assert told in text
    assert text.index("| bus | - |") < text.index("| van | 0.125 |") < text.index("| car | 0.500 |")
    assert "None" not in text


def test_a_model_that_found_nothing_has_no_operating_point() -> None:
    assert "None: on val no threshold gave a hit." in as_markdown(replace(CARD, threshold=None))


def test_a_card_without_an_analysis_says_less() -> None:
    text = as_markdown(replace(CARD, errors={}, recall_by_size={}, ap_by_class={}, precision=None, recall=None))
    assert "AP is lowest for no class." in text
    assert "lost to errors" not in text


def test_a_description_fits_the_registry_and_names_the_digest() -> None:
    short = as_description(as_markdown(CARD), "f" * 64)
    assert short.startswith(as_markdown(CARD))
    assert short.endswith(f"`{'f' * 64}`\n")
    classes = {f"a class of a long name {number:03}": number / 1000 for number in range(300)}
    many = as_markdown(replace(CARD, ap_by_class=classes, classes=tuple(classes)))
    assert f"| {300 - MAX_CLASSES} more | above these |" in many
    assert "and 288 more" in many
    long = as_description(as_markdown(replace(CARD, dataset="x" * 9000)), "f" * 64)
    assert len(long) <= MAX_DESCRIPTION
    assert long.endswith(f"model_card.md among the model's files.\n\nDigest of the model's files: `{'f' * 64}`\n")
