"""Define: detectors in plain torch; imports nothing of ours; no I/O, no printing."""

from __future__ import annotations

from typing import Any, cast

from .csf_net import CSF_NET_SIZES
from .foreground_probe import FOREGROUND_PROBE_SIZES
from .gf_fpn import PYRAMID_SIZES
from .interface import Architecture, Detector
from .settings import InvalidSetting, UnknownArchitecture, apply_settings, unknown_message
from .yolov8 import YOLOV8_SIZES
from .yolox import YOLOX_SIZES

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (*YOLOX_SIZES, *YOLOV8_SIZES, *CSF_NET_SIZES, *PYRAMID_SIZES, *FOREGROUND_PROBE_SIZES)
}


def configure(name: str, **settings: Any) -> Any:
    """Return the config dataclass of an architecture, with `settings` in place of its defaults.

    Raises:
        UnknownArchitecture: no architecture of that name.
        UnknownSetting: the architecture has no setting of that name.
        InvalidSetting: a value is of the wrong type or breaks its rule.
    """
    if name not in ARCHITECTURES:
        raise UnknownArchitecture(unknown_message(name, ARCHITECTURES))
    return apply_settings(ARCHITECTURES[name].config, settings)


def build(name: str, *, num_classes: int, **settings: Any) -> Detector:
    """Return an initialised detector for labels 0..num_classes-1.

    Raises:
        UnknownArchitecture, UnknownSetting, InvalidSetting: as `configure`; the last also for `num_classes` < 1.
    """
    config = configure(name, **settings)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InvalidSetting(
            f"num_classes={num_classes!r} must be an integer of at least 1. Count the dataset's classes."
        )
    return cast(Detector, ARCHITECTURES[name].build(config, num_classes))
