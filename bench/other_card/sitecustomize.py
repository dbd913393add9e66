"""On a worker's PYTHONPATH: lets it find another card than there is, for benchmarks on one card.

SKEIN_HOST_EACH: every rank is a host of its own to NCCL, which refuses two ranks of one host on one GPU.
SKEIN_CARD_BYTES: the GPU has so much memory, of which this process has what its allocator holds and a CUDA context.
"""

import importlib.abc
import importlib.machinery
import os
import sys

CONTEXT = 0.7e9  # bytes


def limited(size, device):
    """Free and all bytes of a card of this size that only this process uses."""
    from torch.cuda.memory import memory_reserved

    return max(int(size - CONTEXT) - memory_reserved(device), 0), size


class SmallCard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.cuda.memory":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            size = int(os.environ["SKEIN_CARD_BYTES"])
            module.mem_get_info = lambda device=None: limited(size, device)

        spec.loader.exec_module = exec_module
        return spec


if "RANK" in os.environ:
    if "SKEIN_HOST_EACH" in os.environ:
        os.environ["NCCL_HOSTID"] = f"skein-{os.environ['RANK']}"
    if "SKEIN_CARD_BYTES" in os.environ:
        sys.meta_path.insert(0, SmallCard())
