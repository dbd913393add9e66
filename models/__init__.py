"""What models look like, as data."""

from .calls import OVERRIDE, WARM_UP_KEY, Options, call_input, call_options, named_arguments
from .share import share
from .stacks import BlockKey, BlockStack, find_stack
from .text_encoders import TEXT_ENCODER_KEEPS

__all__ = [
    "OVERRIDE",
    "TEXT_ENCODER_KEEPS",
    "WARM_UP_KEY",
    "BlockKey",
    "BlockStack",
    "Options",
    "call_input",
    "call_options",
    "find_stack",
    "named_arguments",
    "share",
]
