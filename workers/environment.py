"""Workers on several machines: what ComfyUI's environment says of them. worker/rendezvous.py is the workers' side."""

import os
import re

NODES, ENDPOINT = "SKEIN_NNODES", "SKEIN_RDZV_ENDPOINT"  # in ComfyUI's environment


def machines() -> tuple[int, str]:
    """How many machines ComfyUI's environment asks for, and host:port at which they meet. Raises ValueError."""
    nodes, endpoint = os.environ.get(NODES, "1"), os.environ.get(ENDPOINT, "")
    if not nodes.isdecimal() or nodes == "0":
        raise ValueError(f"{NODES} must be a number of machines, not {nodes!r}.")
    if nodes == "1":
        return 1, ""
    if not re.fullmatch(r"[^\s:]+:\d+", endpoint):
        raise ValueError(f"{NODES} is {nodes}, so set {ENDPOINT} to this machine's host:port, not {endpoint!r}.")
    if endpoint.startswith("0.0.0.0:"):
        raise ValueError(f"{ENDPOINT} must be one address of this machine, not all of them; workers listen there.")
    return int(nodes), endpoint
