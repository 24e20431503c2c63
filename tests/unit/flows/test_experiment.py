from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import flows.experiment
from data.card import UnknownDataset, card_names, load_card
from flows.experiment import RUNS, BadExperiment, load_experiment
from models.settings import UnknownArchitecture, UnknownSetting
from training.spec import RunSpec

VERSIONS = {"sample-aerial": "0" * 32}
SMALL = """
architectures: [yolox-nano]
datasets: [sample-aerial]
training: {epochs: 10}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An experiment of one cell."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_the_cells_are_the_product_by_dataset_then_architecture_then_seed(small: Path) -> None:
    experiment = load_experiment(small, architectures=["yolox-tiny", "yolox-nano"], seeds=[2, 0, 1])
    cells = experiment.cells(VERSIONS)
    assert [(cell.dataset.name, cell.architecture.name, cell.seed) for cell in cells] == [
        ("sample-aerial", architecture, seed) for architecture in ("yolox-tiny", "yolox-nano") for seed in (2, 0, 1)
    ]
    assert len({cell.run_key for cell in cells}) == 6
    assert all(cell.dataset.version == VERSIONS["sample-aerial"] for cell in cells)


@pytest.mark.parametrize(
    "change", ["seeds=[0, 0]", "architectures=[yolox-nano, yolox-nano]", "datasets=[sample-aerial, sample-aerial]"]
)
def test_a_cell_cannot_be_asked_for_twice(small: Path, change: str) -> None:
    with pytest.raises(BadExperiment, match="every value must occur once"):
        load_experiment(small, [change])


def test_a_cell_is_resolved_in_full(small: Path) -> None:
    changes = ["settings.yolox-nano.center_radius=2.0", "training.epochs=3", "compute.workers=1"]
    (cell,) = load_experiment(small, changes).cells(VERSIONS)
    assert cell.architecture.settings["center_radius"] == 2.0
    assert {"depth", "width", "depthwise"} <= cell.architecture.settings.keys()
    assert cell.training.precision in {"bf16", "fp32"}
    assert (cell.training.epochs, cell.compute.workers, cell.dataset.card.name) == (3, 1, "sample-aerial")


def test_what_changes_the_result_changes_the_key_and_where_it_runs_does_not(small: Path) -> None:
    keys = {
        change: load_experiment(small, [change]).cells(VERSIONS)[0].run_key
        for change in ("seeds=[0]", "compute.workers=1", "training.epochs=3", "settings.yolox-nano.center_radius=2.0")
    }
    assert keys["seeds=[0]"] == keys["compute.workers=1"]
    assert len(set(keys.values())) == 3


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid_and_says_what_to_expect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some need data that everybody imports for himself.
    card = load_card("sample-aerial")
    names = card_names()
    monkeypatch.setattr(
        flows.experiment,
        "load_card",
        lambda name: load_card(name) if name in names else card.model_copy(update={"name": name}),
    )
    experiment = load_experiment(path.stem)
    weights = f"sha256:{'0' * 64}" if experiment.training.freeze else None
    cells = experiment.cells(dict.fromkeys(experiment.datasets, "0" * 32), lambda _: weights)
    axes = (experiment.datasets, experiment.resolved_architectures(), experiment.seeds)
    assert len(cells) == len({cell.run_key for cell in cells}) == len(axes[0]) * len(axes[1]) * len(axes[2])
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [
        word for word in ("Aim", "Expected", "Hardware", "Duration", "Command") if word not in "".join(header)
    ] == []


def test_values_are_yaml_and_later_changes_win(small: Path) -> None:
    experiment = load_experiment(
        small,
        [
            "training.learning_rate=2e-3",
            "training.optimizer=adamw",
            "training.augment.mosaic_probability=0.5",
            "training.augment={flip_probability: 0.25}",
            "seeds=[3, 4]",
            "training.epochs=5",
            "training.epochs=6",
        ],
    )
    training = experiment.training
    assert (training.learning_rate, training.optimizer, training.epochs) == (0.002, "adamw", 6)
    assert (training.augment.flip_probability, training.augment.mosaic_probability) == (0.25, 1.0)
    assert experiment.seeds == (3, 4)


def test_a_file_anywhere_is_an_experiment_and_axes_replace_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("architectures: [yolox-s]\ndatasets: [sample-aerial]\nseeds: [7]\n")
    assert load_experiment(path).architectures == ("yolox-s",)
    changed = load_experiment(str(path), architectures=["yolox-m"], seeds=[1])
    assert (changed.architectures, changed.seeds) == (("yolox-m",), (1,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epoch=3", r"training\.epoch: unknown key\. Did you mean 'epochs'\? Known: .*batch_size"),
        ("training.augment.flip_probabilty=0", r"flip_probabilty: unknown key\. Did you mean 'flip_probability'\?"),
        ("scoring.tiling={size: 64}", r"scoring\.tiling\.size: unknown key\. Did you mean 'size_px'\?"),
        ("trainig.epochs=3", r"trainig: unknown key\. Did you mean 'training'\? Known: architectures, budget, compute"),
        ("training.epochs=many", r"training\.epochs: .*integer.* got 'many'"),
        ("training.epochs=0", r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("training.closing_epochs=99", r"closing_epochs must be at most epochs \(10\), got 99"),
        ("training.augment.flip_probability=2", r"flip_probability must be in 0\.\.1, got 2"),
        ("training.optimizer=adam", r"training\.optimizer: .*'sgd' or 'adamw', got 'adam'"),
        ("training=3", r"training: .* got 3"),
        ("seeds=[]", r"seeds: .*at least 1 item"),
        ("training.epochs.value=3", r"'epochs' holds 10, which has no keys"),
        ("architectures.0=yolox-s", r"'architectures' holds \['yolox-nano'\], which has no keys"),
        ("training.epochs", r"--set 'training\.epochs': expected key\.path=value"),
        ("=3", r"--set '=3': expected key\.path=value"),
        ("training.epochs=[3", r"--set 'training\.epochs=\[3': the value is not YAML"),
        ("settings.yolox-s.width=1", r"settings\.yolox-s: not in the matrix \(yolox-nano\)"),
        ("training_by_dataset.sample-surface.epochs=3", r"training_by_dataset\.sample-surface: not in the matrix"),
        ("training_by_dataset.sample-aerial.epoch=3", r"epoch: unknown key\. Did you mean 'epochs'\?"),
        ("training_by_dataset.sample-aerial.epochs=0", r"training_by_dataset\.sample-aerial: epochs: .*, got 0"),
        ("training_by_dataset.sample-aerial.batch_size=1", r"batch_size must be at least compute\.workers"),
    ],
)
def test_a_bad_change_names_key_value_and_remedy(small: Path, change: str, message: str) -> None:
    with pytest.raises(BadExperiment, match=message):
        load_experiment(small, [change])


def test_all_problems_come_at_once(small: Path) -> None:
    with pytest.raises(BadExperiment) as caught:
        load_experiment(small, ["training.epochs=0", "training.batch_size=0", "compute.worker=1"])
    assert [key in str(caught.value) for key in ("training.epochs", "training.batch_size", "compute.worker")] == [
        True
    ] * 3


def test_unknown_names_come_with_the_nearest_known_one(small: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"'yolox-nan' is not known\. Did you mean 'yolox-nano'\?"):
        load_experiment(small, architectures=["yolox-nan"])
    with pytest.raises(UnknownDataset, match=r"'sample-arial' is not known\. Did you mean 'sample-aerial'\?"):
        load_experiment(small, datasets=["sample-arial"])
    with pytest.raises(UnknownSetting, match=r"'widht' is not known\. Did you mean 'width'\?"):
        load_experiment(small, ["settings.yolox-nano.widht=1"])
    with pytest.raises(BadExperiment, match=r"'defalt' is no experiment in flows/runs\. Did you mean 'default'\?"):
        load_experiment("defalt")
    with pytest.raises(BadExperiment, match=r"nowhere\.yaml: no such experiment file"):
        load_experiment(small.parent / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("architectures: [", "not YAML"), ("- yolox-nano\n", "found list"), ("", "found NoneType")]
)
def test_a_file_that_is_no_experiment(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadExperiment, match=message):
        load_experiment(path)


def test_a_dataset_may_have_a_recipe_of_its_own_down_to_one_augmentation(small: Path) -> None:
    changes = ["training_by_dataset.sample-aerial={input_size_px: 64, augment: {translate: 0.3}}"]
    base, changed = load_experiment(small), load_experiment(small, changes)
    assert changed.training == base.training
    training = changed.training_for("sample-aerial")
    assert (training.input_size_px, training.augment.translate) == (64, 0.3)
    assert training.augment.flip_probability == base.training.augment.flip_probability
    (cell,) = changed.cells({"sample-aerial": "0" * 32})
    assert (cell.training.input_size_px, cell.training.epochs) == (64, base.training.epochs)


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        ("settings.yolox-s.width=0.25", lambda cell: cell.architecture.name == "yolox-s"),
        ("training_by_dataset.sample-surface.epochs=3", lambda cell: cell.dataset.name == "sample-surface"),
        ("training.learning_rate=0.5", lambda _: True),
        ("compute.workers=1", lambda _: False),
    ],
)
def test_a_change_concerns_exactly_its_cells(small: Path, change: str, concerned: Callable[[RunSpec], bool]) -> None:
    matrix = ["architectures=[yolox-nano, yolox-s]", "datasets=[sample-aerial, sample-surface]", "seeds=[0, 1]"]
    versions = {"sample-aerial": "0" * 32, "sample-surface": "1" * 32}
    before = load_experiment(small, matrix).cells(versions)
    after = load_experiment(small, [*matrix, change]).cells(versions)
    assert [one.run_key != other.run_key for one, other in zip(before, after, strict=True)] == [
        concerned(cell) for cell in before
    ]
    newer = load_experiment(small, matrix).cells(versions | {"sample-aerial": "2" * 32})
    assert [one.run_key != other.run_key for one, other in zip(before, newer, strict=True)] == [
        cell.dataset.name == "sample-aerial" for cell in before
    ]


def test_settings_of_an_architecture_that_was_not_chosen_do_no_harm(small: Path) -> None:
    sets = ["architectures=[yolox-nano, yolox-s]", "settings.yolox-s.width=0.25"]
    assert load_experiment(small, sets, architectures=["yolox-nano"]).architectures == ("yolox-nano",)


def test_a_dataset_without_a_version_has_no_cells(small: Path) -> None:
    assert load_experiment(small).cells({}) == []


def test_a_warm_start_is_asked_for_each_cold_cell_and_is_part_of_its_key(small: Path) -> None:
    weights = f"sha256:{'5' * 64}"
    asked = []

    def warm_start(spec: RunSpec) -> str | None:
        asked.append(spec.run_key)
        return weights if spec.seed else None

    experiment = load_experiment(small, ["training.warm_start=champion", "seeds=[0, 1]"])
    cold, warm = experiment.cells({"sample-aerial": "0" * 32}, warm_start)
    assert (cold.training.warm_start, warm.training.warm_start) == (None, weights)
    assert asked == [cold.run_key, warm.with_warm_start(None).run_key]
    assert len({*asked, warm.run_key}) == 3


def test_a_list_of_settings_makes_a_cell_of_each(small: Path) -> None:
    variants = "[{}, {center_radius: 2.0}, {width: 0.5}]"
    experiment = load_experiment(small, [f"settings.yolox-nano={variants}", "seeds=[0, 1]"])
    cells = experiment.cells({"sample-aerial": "0" * 32})
    nano = [cell for cell in cells if cell.architecture.name == "yolox-nano"]
    assert len({cell.run_key for cell in nano}) == len(nano) == 6
    assert [cell.architecture.label for cell in nano[::2]] == [
        "yolox-nano", "yolox-nano center_radius=2.0", "yolox-nano width=0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("settings.depht=0.5", r"depht: expected settings by architecture, as in settings\.depht\.width=0\.5"),
        ("settings.yolox-nano=[{}, {width: 0.25}]", "two variants come to the same settings"),
        ("settings.yolox-nano=[]", "an empty list makes no cell"),
        ("settings.yolox-nano=[{}, {widht: 0.5}]", "widht"),
    ],
)
def test_wrong_settings_name_their_rule(small: Path, change: str, rule: str) -> None:
    with pytest.raises((BadExperiment, LookupError), match=rule):
        load_experiment(small, [change])


def test_a_change_of_the_recipe_holds_for_every_dataset(small: Path) -> None:
    own = "training_by_dataset.sample-aerial={epochs: 9, batch_size: 4, augment: {translate: 0.3, scale_min: 0.7}}"
    sets = [own, "training.epochs=3", "training.augment.scale_min=0.9"]
    training = load_experiment(small, sets).training_for("sample-aerial")
    assert (training.epochs, training.batch_size) == (3, 4)
    assert (training.augment.scale_min, training.augment.translate) == (0.9, 0.3)
    assert load_experiment(small, [*sets[1:], own]).training_for("sample-aerial").epochs == 9
