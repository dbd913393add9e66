"""What models look like, as data, and the seam by which a run stands around their calls and blocks."""

from .architecture import Architecture, PerToken, Stack
from .call import (
    OPTIONS,
    OVERRIDE,
    WARM_UP_KEY,
    ModelCall,
    Options,
    Place,
    Values,
    first_tensor,
    pass_by,
    passed_by,
    streams,
)
from .families import KNOWN_MODELS
from .network import Block, Network
from .seam import Forward, RunBlock, RunModel, Seam, entry_of
from .share import share
from .text_encoders import TEXT_ENCODER_KEEPS

__all__ = [
    "KNOWN_MODELS",
    "OPTIONS",
    "OVERRIDE",
    "TEXT_ENCODER_KEEPS",
    "WARM_UP_KEY",
    "Architecture",
    "Block",
    "Forward",
    "ModelCall",
    "Network",
    "Options",
    "PerToken",
    "Place",
    "RunBlock",
    "RunModel",
    "Seam",
    "Stack",
    "Values",
    "entry_of",
    "first_tensor",
    "pass_by",
    "passed_by",
    "share",
    "streams",
]
