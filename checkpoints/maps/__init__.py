"""One page a family of models. A new class of diffusers' is a page here and its name in MAPS."""

from ..keys import KeyMap
from .hunyuan_video import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15

MAPS: tuple[KeyMap, ...] = (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_IMAGE,
)
