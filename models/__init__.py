"""What a model looks like, as data: the only room that knows one architecture from another."""

from .stacks import BlockStack, find_stack

__all__ = ["BlockStack", "find_stack"]
