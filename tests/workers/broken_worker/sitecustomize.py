"""On a worker's PYTHONPATH: makes one rank's model calls fail, without a line for it in the worker.

SKEIN_BREAK names the rank and the exception: "1:RuntimeError", "1:OutOfMemoryError", "1:AcceleratorError".
"""

import importlib.abc
import importlib.machinery
import os
import sys

rank, _, kind = os.environ.get("SKEIN_BREAK", "").partition(":")


class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "skein.worker.worker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.Worker.call = fail

        spec.loader.exec_module = exec_module
        return spec


def fail(self, *args, **kwargs):
    import torch

    if kind == "AcceleratorError":
        raise torch.AcceleratorError("CUDA error: out of memory")
    raise {"OutOfMemoryError": torch.OutOfMemoryError, "RuntimeError": RuntimeError}[kind]("broken for the test")


if rank and os.environ.get("RANK") == rank:
    sys.meta_path.insert(0, Breaker())
