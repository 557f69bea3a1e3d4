"""The number of devices that ``trainer.devices`` asks for."""

from typing import Any


def devices_per_node(devices: Any) -> int | None:
    """Return the number of devices of each machine, and so of its processes; None if the machine decides.

    Args:
        devices: value of ``trainer.devices``: a number, a list of devices, the same as text, ``auto`` or -1.

    Example:
        >>> [devices_per_node(devices) for devices in (2, "2", [0, 3], "0,3", "0,", "auto", -1)]
        [2, 2, 2, 2, 1, None, None]
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices) or None
    return int(devices) or None if str(devices).isdigit() else None
