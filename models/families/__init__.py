"""One page a family of models. A new family is a page here and its name in FAMILIES."""

from ..architecture import Architecture
from .flux import HUNYUAN_VIDEO

FAMILIES: tuple[Architecture, ...] = (HUNYUAN_VIDEO,)
