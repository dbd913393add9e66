"""What a model looks like, as data: the only room that knows one architecture from another."""

from .stacks import Blocks, BlockStack, find_blocks, find_stack
from .text_encoders import TEXT_ENCODER_KEEPS

__all__ = ["TEXT_ENCODER_KEEPS", "BlockStack", "Blocks", "find_blocks", "find_stack"]
