from __future__ import annotations

import dataclasses
import json

import pytest

import models
from models.settings import InvalidSetting, UnknownArchitecture, UnknownSetting


def test_configure_replaces_only_what_is_given() -> None:
    default = models.configure("yolox-s")
    changed = models.configure("yolox-s", candidate_mode="box_or_center", center_radius=2.5)
    assert changed == dataclasses.replace(default, candidate_mode="box_or_center", center_radius=2.5)
    assert default == models.ARCHITECTURES["yolox-s"].config
    assert (default.candidate_mode, default.center_radius) == ("center", 1.5)


def test_settings_reach_the_detector() -> None:
    detector = models.build("yolox-nano", num_classes=2, center_radius=2, candidate_mode="box_or_center")
    assert detector.assigner == models.assigners.SimOTA("box_or_center", 2.0)
    assert detector.num_classes == 2
    assert detector.strides == (8, 16, 32)


def test_an_integer_becomes_the_float_that_it_equals() -> None:
    assert repr(models.configure("yolox-s", center_radius=2).center_radius) == "2.0"


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_settings_survive_json(name: str) -> None:
    config = models.ARCHITECTURES[name].config
    again = models.configure(name, **json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], (4, 8, 16, 32)])
def test_a_list_becomes_the_tuple_that_the_field_holds(strides: object) -> None:
    assert models.configure("yolox-s", strides=strides).strides == (4, 8, 16, 32)


def test_null_is_a_value_only_where_the_field_says_so() -> None:
    assert models.configure("foreground-probe-n", fixed_gate=1).fixed_gate == 1.0
    assert models.configure("foreground-probe-n", fixed_gate=None).fixed_gate is None
    with pytest.raises(InvalidSetting, match="strides=None must be of type list of int"):
        models.configure("foreground-probe-n", strides=None)


def test_an_unknown_architecture_names_the_nearest_and_all() -> None:
    with pytest.raises(
        UnknownArchitecture, match=r"'yolox-tinny' is not known. Did you mean 'yolox-tiny'\? Known: "
    ) as error:
        models.build("yolox-tinny", num_classes=1)
    assert all(name in str(error.value) for name in models.ARCHITECTURES)


def test_an_unknown_name_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(UnknownArchitecture, match=r"'@' is not known\. Known: yolox-nano"):
        models.configure("@")


def test_an_unknown_setting_names_the_nearest_and_all() -> None:
    with pytest.raises(
        UnknownSetting, match=r"'centre_radius' is not known. Did you mean 'center_radius'\? Known: depth"
    ):
        models.configure("yolox-s", centre_radius=2.5)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"depthwise": 1}, "must be of type bool, not int"),
        ({"depth": "0.33"}, "must be of type float, not str"),
        ({"depth": True}, "must be of type float, not bool"),
        ({"depth": None}, "must be of type float, not NoneType"),
        ({"candidate_mode": "centre"}, r"must be one of \['center', 'box_or_center'\]"),
        ({"candidate_mode": ["center"]}, "must be one of"),
        ({"center_radius": 0.0}, "must be finite and above 0"),
        ({"width": float("nan")}, "must be finite and above 0"),
        ({"depth": float("inf")}, "must be finite and above 0"),
        ({"width": 0.01}, "must be at least 1/64"),
        ({"strides": 8}, "must be of type list of int, not int"),
        ({"strides": "8, 16, 32"}, "must be of type list of int, not str"),
        ({"strides": ()}, "must double from 4 or 8 up to 32"),
        ({"strides": (32, 16, 8)}, "must double from 4 or 8 up to 32"),
        ({"strides": (8, 16)}, "must double from 4 or 8 up to 32"),
        ({"strides": (16, 32)}, "must double from 4 or 8 up to 32"),
        ({"strides": (8, 16, 32, 64)}, "must double from 4 or 8 up to 32"),
        ({"strides": (4, 16, 32)}, "must double from 4 or 8 up to 32"),
    ],
)
def test_a_wrong_value_names_itself_and_the_rule(settings: dict[str, object], rule: str) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(InvalidSetting, match=rule) as error:
        models.configure("yolox-s", **settings)
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "3"])
def test_the_number_of_classes_must_be_a_positive_integer(num_classes: object) -> None:
    with pytest.raises(InvalidSetting, match="must be an integer of at least 1"):
        models.build("yolox-nano", num_classes=num_classes)


@pytest.mark.parametrize("item", ["16", 16.0, True, None])
def test_a_wrong_item_of_a_list_names_its_place(item: object) -> None:
    with pytest.raises(InvalidSetting, match=r"strides\[1\]=.* must be of type int, not ") as error:
        models.configure("yolox-s", strides=[8, item, 32])
    assert repr(item) in str(error.value)
