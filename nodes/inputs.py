"""Inputs that several nodes have."""

from comfy_api.latest import io


def part_of_sampling(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A part of sampling, from 0 to 1: ComfyUI's start_percent and end_percent."""
    return io.Float.Input(name, default=default, optional=True, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
