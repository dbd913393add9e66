"""One page a family of models. A new class of diffusers' is a page here and its name in MAPS.

ComfyUI knows some classes by diffusers' keys, and converts them: FLUX.1, SD3, Z-Image, AuraFlow, PixArt, Qwen-Image,
HiDream, Kandinsky 5. They need no map.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..keys import KeyMap
from . import cogvideox, ltx, qwen_image
from .cogvideox import COGVIDEOX
from .cosmos import COSMOS_PREDICT2
from .flux import CHROMA, FLUX2
from .hunyuan_video import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from .ltx import LTX_VIDEO
from .lumina import LUMINA2
from .mochi import MOCHI
from .wan import WAN, WAN_VACE

MAPS: tuple[KeyMap, ...] = (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_IMAGE,
    WAN,
    WAN_VACE,
    FLUX2,
    CHROMA,
    LTX_VIDEO,
    COGVIDEOX,
    MOCHI,
    LUMINA2,
    COSMOS_PREDICT2,
)

# Of a class: what ComfyUI does not find out from the weights, as attributes of its network by their paths. Made of what
# config.json says, and of the pipeline's class.
SETTINGS: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": cogvideox.settings,
    "LTXVideoTransformer3DModel": ltx.settings,
    "QwenImageTransformer2DModel": qwen_image.settings,
}
