"""What is told of the machine while a model trains."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pynvml
import pytest

from training.system import SystemMeter, by_node


def test_a_gpu_that_does_not_say_costs_its_own_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a GPU (MIG) the driver tells the memory, and refuses the utilisation."""

    def refused(_: object) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refused)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=3 * 2**30))
    meter = SystemMeter()
    readings = meter.read()
    meter.close()
    assert {name: value for name, value in readings.items() if "gpu" in name} == {"system/gpu0_memory_gib": 3.0}
    assert readings["system/memory_used_gib"] > 0


def test_a_reading_is_the_mean_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([10.0, 20.0, 60.0])
    all_taken = threading.Event()

    def gpus() -> dict[str, float]:
        value = next(values, None)
        if value is None:
            all_taken.set()
        return {} if value is None else {"system/gpu0_percent": value}

    monkeypatch.setattr("training.system._gpus", gpus)
    monkeypatch.setattr("training.system.SAMPLE_EVERY_S", 0.01)
    meter = SystemMeter()
    assert all_taken.wait(60)
    assert meter.read()["system/gpu0_percent"] == 30.0
    assert "system/gpu0_percent" not in meter.read(), "nothing was measured since"
    meter.close()


def test_a_busy_processor_shows() -> None:
    meter, core_s = SystemMeter(), time.process_time()
    while time.process_time() - core_s < 0.2:
        pass
    reading = meter.read()
    meter.close()
    assert 0 < reading["system/cpu_percent"] <= 100
    assert meter.read().keys() == reading.keys()


def test_nodes_other_than_the_first_are_told_apart_as_mlflow_does() -> None:
    readings = [(0, {"system/cpu_percent": 1.0}), (2, {"system/cpu_percent": 2.0, "system/gpu0_percent": 3.0})]
    assert by_node(readings) == {
        "system/cpu_percent": 1.0,
        "system/node_2/cpu_percent": 2.0,
        "system/node_2/gpu0_percent": 3.0,
    }
