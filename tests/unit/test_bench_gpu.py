"""The GPU's bench, on a CPU: that it runs and counts, for its figures are another machine's."""

from __future__ import annotations

import re

import pytest
import torch

from tests import bench_gpu


def test_the_bench_of_a_gpu_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --architectures yolox-nano --sizes 64 --batch 2 --steps 2 --matrix 128 --no-compile"
    bench_gpu.main(arguments.split())
    peak, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"cpu: bf16 matrix products at \d+\.\d+ TFLOP/s", peak)
    found = re.fullmatch(
        r"yolox-nano 64 px batch 2 eager: ([\d.]+) images/s, 0\.00 GiB, ([\d.]+)% of the products", line
    )
    assert found is not None, line
    assert float(found[1]) > 0


def test_what_does_not_fit_into_memory_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_gpu, "step_speed", full)
    bench_gpu.main(["--device", "cpu", "--matrix", "16", "--sizes", "64", "--architectures", "yolox-s,yolox-l"])
    assert capsys.readouterr().out.count("out of memory") == 4
