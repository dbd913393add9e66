"""What of a model call's transformer_options travels to the workers."""

import logging
from typing import Any

from .. import conflicts
from ..models import OVERRIDE
from .protocol import NotPlain, pack

logger = logging.getLogger("skein")

LOCAL_OPTIONS = ("wrappers", "callbacks", "patches", "patches_replace", OVERRIDE, "context_window")


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """What is plain data; code that would have an effect in the workers is refused before."""
    conflicts.refuse_call(options)
    found = {}
    for name, value in options.items():
        if name in LOCAL_OPTIONS:
            continue
        try:
            pack(value, [])
        except NotPlain as error:
            logger.debug("Skein workers: %s stays behind (%s)", name, error)
            continue
        found[name] = value
    window = getattr(options.get("context_window"), "index_list", None)
    if window is not None:
        found["context_window"] = list(window)
    return found
