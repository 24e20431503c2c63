"""Progress from the very lines that a job says, and addresses of pages."""

from __future__ import annotations

import pytest

import flows.cell_page
from flows.cell_page import CellPage, progress
from tracking.client import run_page
from training.meter import Progress
from training.run import _line


@pytest.mark.parametrize(("epoch", "step", "percent"), [(1, 0, 0.0), (1, 5, 12.5), (2, 20, 50.0), (4, 40, 100.0)])
def test_the_share_of_a_training_is_read_from_its_news(epoch: int, step: int, percent: float) -> None:
    news = Progress(epoch=epoch, epochs=4, step=step, steps=40, loss=1.0, images_per_s=20.0, eta_s=61.0)
    assert progress(_line(news)) == (percent, f"ETA 1:01, epoch {epoch}/4")


@pytest.mark.parametrize("line", ["epoch 1/4 done: loss 0.5", "scoring on the test split", ""])
def test_other_lines_tell_nothing(line: str) -> None:
    assert progress(line) is None


def test_outside_of_a_task_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    for name in ("create_progress_artifact", "create_link_artifact"):
        monkeypatch.setattr(flows.cell_page, name, lambda *given, **named: sent.append((given, named)))
    page = CellPage("abc", "yolox-nano / x / seed 0")
    page.tell("epoch 1/4 step 5/10 loss 1.000 20.0 img/s ETA 1:01")
    page.link("Ray", "http://127.0.0.1:8265/#/jobs/abc-1")
    page.done()
    assert sent == []


def test_a_runs_page_in_mlflow_shows_no_password() -> None:
    assert (
        run_page("https://speck:secret@mlflow.example:8443/ml/", "ab12") == "https://mlflow.example:8443/ml/#/runs/ab12"
    )
    assert run_page("sqlite:////home/x/mlflow.db", "ab12") is None
