"""On a worker's PYTHONPATH: makes one rank fail, without a line for it in the worker.

SKEIN_BREAK names the rank and the exception that its model calls raise: "1:RuntimeError", "1:OutOfMemoryError",
"1:AcceleratorError"; or "1:sparse": its kernel of sparse attention raises from the ninth attention on.
"""

import importlib.abc
import importlib.machinery
import itertools
import os
import sys

rank, _, kind = os.environ.get("SKEIN_BREAK", "").partition(":")


class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != ("skein.attention.sparse.kernels" if kind == "sparse" else "skein.worker.worker"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if kind == "sparse":
                break_kernels(module)
            else:
                module.Worker.call = fail

        spec.loader.exec_module = exec_module
        return spec


def fail(self, *args, **kwargs):
    import torch

    if kind == "AcceleratorError":
        raise torch.AcceleratorError("CUDA error: out of memory")
    raise {"OutOfMemoryError": torch.OutOfMemoryError, "RuntimeError": RuntimeError}[kind]("broken for the test")


def break_kernels(module):
    calls, works = itertools.count(), module.PLAIN.run

    def run(*inputs):
        if next(calls) >= 9:
            raise RuntimeError("broken for the test")
        return works(*inputs)

    object.__setattr__(module.PLAIN, "run", run)


if rank and os.environ.get("RANK") == rank:
    sys.meta_path.insert(0, Breaker())
