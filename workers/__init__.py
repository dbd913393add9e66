"""Worker processes as ComfyUI's process sees them: started, asked, ended. What runs inside of them is in worker/."""

from .conversation import GroupError
from .delegation import delegated
from .group import in_use, release
from .wanted import setting_of, visible_devices

__all__ = ["GroupError", "delegated", "in_use", "release", "setting_of", "visible_devices"]
