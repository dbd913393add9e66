"""One page a family of models. A new class of diffusers' is a page here and its name in MAPS."""

from ..keys import KeyMap
from .hunyuan_video import HUNYUAN_VIDEO

MAPS: tuple[KeyMap, ...] = (HUNYUAN_VIDEO,)
