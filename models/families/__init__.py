"""One page a family of models. A new family is a page here and its name in FAMILIES."""

from ..architecture import Architecture
from .cogvideox import COGVIDEOX
from .flux import FLUX, HUNYUAN_VIDEO
from .hidream import HIDREAM
from .ltx import LTX2, LTXV
from .lumina import LUMINA
from .mochi import MOCHI
from .others import OTHERS
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import ALL_FRAMES, CAUSAL, VACE, WAN

# For what users read.
KNOWN_MODELS = "HunyuanVideo, FLUX, Wan, SD3, Qwen-Image or another diffusion transformer that Skein knows"

FAMILIES: tuple[Architecture, ...] = (
    HUNYUAN_VIDEO,
    FLUX,
    SD3,
    MOCHI,
    COGVIDEOX,
    WAN,
    VACE,
    ALL_FRAMES,
    CAUSAL,
    QWEN_IMAGE,
    LTXV,
    LTX2,
    LUMINA,
    HIDREAM,
    *OTHERS,
)
