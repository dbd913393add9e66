"""Pages of a file that were read once and that nobody needs in memory any more.

The system would keep them until it needs the memory, and counts them until then. They are dropped from this process,
and from the system's cache of the file unless another process has them mapped. What is read there later comes from the
disk again.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable

from torch import Tensor

from ..files import Mapped, memory_of_files

DONTNEED = 4  # Linux's MADV_DONTNEED, which Python's mmap knows but gives for its own maps only


def addresses(tensor: Tensor) -> range:
    """Where a contiguous tensor's numbers lie in this process's memory."""
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def give_back(parts: Iterable[range]) -> None:
    """Drop the whole pages of parts of memory that lie in files, and that nobody has written to there. Linux's alone;
    where it cannot be done nothing happens."""
    mapped = memory_of_files()  # empty where there is no Linux
    for part in parts:
        # Two weights may share a page at each end.
        start, stop = -(-part.start // mmap.PAGESIZE) * mmap.PAGESIZE, part.stop // mmap.PAGESIZE * mmap.PAGESIZE
        file = next((each for each in mapped if start in each.addresses and stop <= each.addresses.stop), None)
        if file is not None and start < stop:
            _drop(file, start, stop - start)


def _drop(file: Mapped, start: int, size: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), DONTNEED)
    try:
        descriptor = os.open(file.path, os.O_RDONLY)
    except OSError:  # it has no name any more
        return
    try:
        os.posix_fadvise(descriptor, file.offset + start - file.addresses.start, size, os.POSIX_FADV_DONTNEED)
    except OSError:  # a file system that has no such cache
        pass
    finally:
        os.close(descriptor)
