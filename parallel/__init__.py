"""Context parallelism: one video over several devices, in worker processes that outlive the prompt."""

from .group import GroupError, release, visible_devices
from .mesh import Mesh
from .remote import delegated
from .shard import Sharding

__all__ = ["GroupError", "Mesh", "Sharding", "delegated", "release", "visible_devices"]
