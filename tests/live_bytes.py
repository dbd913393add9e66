"""Counts the bytes of tensors that live, where no device counts them: on the CPU."""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: `peak` is the most bytes at once of tensors that were made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()  # storages that have been seen and live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)  # seen for the first time as an argument: it was there before
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._see(storage, storage.nbytes())
        return out

    def _see(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _storages(values: Any) -> list[UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]
