from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.augment import AugmentConfig
from training.spec import (
    ArchitectureSpec,
    ComputeSpec,
    RunSpec,
    ScoringSpec,
    TrainingSpec,
    canonical_json,
    cpu_is_faster_in_bf16,
    resolve_precision,
)

MakeSpec = Callable[..., RunSpec]
OTHER = {
    "optimizer": "adamw",
    "precision": "bf16",
    "input_size_px": 96,
    "warm_start": f"sha256:{'0' * 64}",
    "freeze": ("backbone",),
    "repeat_threshold": 0.001,
    "sync_batch_norm": False,
    "compile": True,
    "clip_norm": 10.0,
    "patience_epochs": 5,
}
recipes = st.builds(
    TrainingSpec,
    epochs=st.integers(2, 4),
    closing_epochs=st.integers(0, 2),
    batch_size=st.integers(1, 3),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    learning_rate=st.sampled_from([0.01, 0.02, 1.0]),
    precision=st.sampled_from(["bf16", "fp32"]),
    augment=st.builds(AugmentConfig, flip_probability=st.sampled_from([0.0, 0.5]), translate=st.floats(0, 0.2)),
)


def another(name: str, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    return value + 1 if isinstance(value, int) else value / 2


def shuffled(value: Any, order: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    keys = order.sample(list(value), len(value))
    return {key: shuffled(value[key], order) for key in keys}


@pytest.mark.parametrize("name", [name for name in TrainingSpec.model_fields if name != "augment"])
def test_the_run_key_depends_on_every_field_of_the_recipe(tiny_spec: MakeSpec, name: str) -> None:
    base = tiny_spec()
    value = another(name, getattr(base.training, name))
    assert tiny_spec(**{name: value}).run_key != base.run_key


@pytest.mark.parametrize("name", [field.name for field in fields(AugmentConfig)])
def test_the_run_key_depends_on_every_augmentation(tiny_spec: MakeSpec, name: str) -> None:
    augment = AugmentConfig()
    changed = replace(augment, **{name: getattr(augment, name) / 2 or 0.5})
    assert tiny_spec(augment=changed).run_key != tiny_spec().run_key


def test_the_run_key_depends_on_data_architecture_and_seed(tiny_spec: MakeSpec) -> None:
    base = tiny_spec()
    settings = base.architecture.settings
    card = base.dataset.card.model_copy(update={"classes": ("bright", "black")})
    others = [
        base.model_copy(update={"seed": 1}),
        base.model_copy(update={"architecture": ArchitectureSpec(name="yolox-tiny", settings=settings)}),
        base.model_copy(update={"dataset": base.dataset.model_copy(update={"version": "0" * 32})}),
        base.model_copy(update={"dataset": base.dataset.model_copy(update={"name": "other"})}),
        base.model_copy(update={"dataset": base.dataset.model_copy(update={"card": card})}),
    ]
    for name, value in settings.items():
        changed = settings | {name: not value if isinstance(value, bool) else value * 2}
        others.append(base.model_copy(update={"architecture": ArchitectureSpec(name="yolox-nano", settings=changed)}))
    keys = [spec.run_key for spec in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


def test_what_a_card_tells_people_alone_stays_outside_the_run_key(tiny_spec: MakeSpec) -> None:
    base = tiny_spec()
    told = {"description": "other", "licence": "other", "source": "other"}
    card = base.dataset.card.model_copy(update=told)
    assert base.model_copy(update={"dataset": base.dataset.model_copy(update={"card": card})}).run_key == base.run_key


@given(
    compute=st.builds(
        ComputeSpec,
        workers=st.integers(1, 64),
        cpus_per_worker=st.floats(0.5, 8),
        gpus_per_worker=st.floats(0, 1),
        loader_processes=st.integers(0, 8),
        cache_gib=st.floats(0, 9),
        max_failures=st.integers(0, 9),
    ),
    scoring=st.builds(ScoringSpec, score_threshold=st.floats(0, 1), max_dets=st.integers(1, 500)),
    order=st.randoms(use_true_random=False),
)
def test_neither_compute_nor_scoring_nor_key_order_enter_the_run_key(
    tiny_spec: MakeSpec, compute: ComputeSpec, scoring: ScoringSpec, order: random.Random
) -> None:
    base = tiny_spec()
    other = tiny_spec(compute=compute, scoring=scoring)
    content = shuffled(json.loads(other.model_dump_json()), order)
    assert RunSpec.model_validate(content).run_key == other.run_key == base.run_key


@given(one=recipes, two=recipes)
def test_two_recipes_share_a_run_key_only_if_they_are_equal(
    tiny_spec: MakeSpec, one: TrainingSpec, two: TrainingSpec
) -> None:
    keys = [tiny_spec().model_copy(update={"training": recipe}).run_key for recipe in (one, two)]
    assert (keys[0] == keys[1]) == (one == two)


@given(recipe=recipes)
def test_a_spec_survives_json(tiny_spec: MakeSpec, recipe: TrainingSpec) -> None:
    spec = tiny_spec().model_copy(update={"training": recipe})
    again = RunSpec.model_validate_json(canonical_json(spec.model_dump(mode="json")))
    assert (again, again.run_key) == (spec, spec.run_key)


def test_whole_numbers_and_floats_are_one_value(tiny_spec: MakeSpec) -> None:
    assert tiny_spec(learning_rate=1).run_key == tiny_spec(learning_rate=1.0).run_key


@pytest.mark.parametrize(
    ("place", "key"),
    [((), "epoch"), (("training",), "learningrate"), (("training", "augment"), "flip"), (("scoring",), "nms"),
     (("compute",), "gpu"), (("dataset",), "hash"), (("dataset", "card"), "class"), (("architecture",), "width")],
)  # fmt: skip
def test_unknown_keys_are_refused(tiny_spec: MakeSpec, place: tuple[str, ...], key: str) -> None:
    content = json.loads(tiny_spec().model_dump_json())
    inner = content
    for part in place:
        inner = inner[part]
    inner[key] = 1
    with pytest.raises(ValidationError, match=key):
        RunSpec.model_validate(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("input_size_px", 100), ("learning_rate", 0.0), ("momentum", 1.0),
     ("closing_epochs", 3), ("optimizer", "lion"), ("precision", "fp16"), ("learning_rate", float("inf"))],
)  # fmt: skip
def test_impossible_recipes_are_refused(tiny_spec: MakeSpec, name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        tiny_spec(**{name: value})


def test_a_run_has_no_identity_before_its_precision_is_resolved(tiny_spec: MakeSpec) -> None:
    with pytest.raises(ValidationError, match="resolve_precision"):
        tiny_spec(precision="auto")


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True), ("GenuineIntel", "avx512f avx512_bf16", False),
     ("AuthenticAMD", "avx512f avx512_bf16", True), ("AuthenticAMD", "avx2", False)],
)  # fmt: skip
def test_a_processor_takes_bf16_where_that_is_faster(tmp_path: Path, vendor: str, flags: str, faster: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n")
    assert cpu_is_faster_in_bf16(cpuinfo) is faster


def test_precision_auto_is_bf16_on_gpus_and_where_the_processor_is_faster(tmp_path: Path) -> None:
    assert resolve_precision("auto", gpus_per_worker=1) == "bf16"
    assert resolve_precision("auto", gpus_per_worker=0) == ("bf16" if cpu_is_faster_in_bf16() else "fp32")
    assert not cpu_is_faster_in_bf16(tmp_path / "no Linux")


@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_named_precision_is_kept(precision: str, gpus: float) -> None:
    assert resolve_precision(precision, gpus_per_worker=gpus) == precision


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_canonical_json_refuses_what_is_not_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"workers": (3, 2)}, r"min <= max, got \[3, 2\]"),
        ({"workers": (1, 2), "placement": "STRICT_SPREAD"}, "use SPREAD"),
        ({"accelerator": "A100"}, "needs gpus_per_worker above 0"),
        ({"workers": 0}, "greater than or equal to 1"),
    ],
)
def test_workers_that_cannot_be_are_refused(compute: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ComputeSpec(**compute)


def test_a_number_of_workers_is_a_range_of_one_and_a_range_comes_back_from_json() -> None:
    assert (ComputeSpec(workers=3).min_workers, ComputeSpec(workers=3).max_workers) == (3, 3)
    elastic = ComputeSpec(workers=(1, 4))
    assert ComputeSpec.model_validate_json(elastic.model_dump_json()) == elastic
    assert (elastic.min_workers, elastic.max_workers) == (1, 4)
