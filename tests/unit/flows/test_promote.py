"""What of a run becomes part of the registered model, by a real store in a SQLite file."""

from __future__ import annotations

from collections.abc import Callable

from flows.cells import CellOutcome
from flows.find_model import find_model
from flows.promote import promote_best
from flows.settings import Settings
from tracking.client import connect
from tracking.runs import DatasetRef, ensure_run
from training.artifacts import OPERATING_POINT, read_operating_point
from training.checkpoint import save_tensors
from training.records import RunResult, hash_files
from training.spec import RunSpec
from training.state import build_model


def test_the_champion_has_its_run_s_operating_point(
    settings: Settings, tiny_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    spec = tiny_spec()
    folder = settings.storage / spec.run_key
    (folder / "artifacts").mkdir(parents=True)
    save_tensors(folder / "artifacts" / "weights.safetensors", build_model(spec).state_dict())
    # Laid out as no writer of JSON would: it has to arrive as it is.
    content = (
        '{"overall":  {"score": 0.0625, "precision": 1, "recall": 0.5, "f1": 0.5},\n "per_class": {"dark": null}}\n'
    )
    (folder / "artifacts" / OPERATING_POINT).write_text(content)
    result = make_result(spec, 0.5, 0.5, files=hash_files(folder, folder / "artifacts"))
    client = connect(settings.tracking_uri)
    run_id = ensure_run(
        client, experiment=spec.dataset.name, run_key=spec.run_key, training_id=spec.run_key, name="x", params={},
        tags={}, dataset=DatasetRef(spec.dataset.name, spec.dataset.version, "", {"test": 1}), start_time_ms=1,
    )  # fmt: skip
    assert promote_best(client, [CellOutcome(result, run_id, False, {})], settings).verdict.promote
    with find_model(f"models:/{spec.dataset.name}@champion", settings) as model:
        assert model.weights.with_name(OPERATING_POINT).read_text() == content
        assert model.operating_point == read_operating_point(folder / "artifacts")
