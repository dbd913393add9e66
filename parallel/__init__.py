"""Context parallelism: the tokens of one model call, shared among ranks."""

from .mesh import Mesh
from .shard import Sharding
from .share import Share

__all__ = ["Mesh", "Sharding", "Share"]
