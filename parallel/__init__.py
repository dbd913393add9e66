"""Context parallelism: one video over several devices, in worker processes that outlive the prompt."""

from .group import GroupError, release, visible_devices
from .mesh import Mesh
from .remote import delegated, setting_of
from .shard import Sharding

__all__ = ["GroupError", "Mesh", "Sharding", "delegated", "release", "setting_of", "visible_devices"]
