"""What is told of the machine while a model trains."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from training.system import SystemMeter


def test_a_gpu_that_does_not_say_costs_its_own_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a GPU (MIG) the driver tells the memory, and refuses the utilisation."""

    def refused(_: object) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refused)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=3 * 2**30))
    readings = SystemMeter().read()
    assert {name: value for name, value in readings.items() if "gpu" in name} == {"system/gpu0_memory_gib": 3.0}
    assert readings["system/memory_used_gib"] > 0
