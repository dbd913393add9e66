"""Inputs that several nodes have."""

from comfy_api.latest import io

from ..plan import check_devices, device_names
from ..workers import visible_devices


def part_of_sampling(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A part of sampling, from 0 to 1: ComfyUI's start_percent and end_percent."""
    return io.Float.Input(name, default=default, optional=True, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def devices_input(default: str, advanced: bool = False) -> io.String.Input:
    """The devices to compute on, as text."""
    tooltip = '"all" GPUs, or their numbers, such as "0,1". "cpu,cpu": two processes on the CPU.'
    return io.String.Input("devices", default=default, optional=True, tooltip=tooltip, advanced=advanced)


def check_devices_here(devices: str | None) -> bool | str:
    """For a node's validate_inputs, when the prompt is queued: True, or a sentence if devices are named that are not
    there. None: they come by a link."""
    try:
        names = device_names(devices or "all")
        check_devices(names, devices or "all")
        if names != ["all"]:
            visible_devices(names)
    except ValueError as error:
        return str(error)
    return True
