"""What a safetensors file says of itself: a broken file is found before anything of it is loaded."""

import json
from pathlib import Path

POINTER = b"version https://git-lfs"  # begins the file that Git leaves where Git LFS is missing
LENGTH_BYTES = 8
MAX_BYTES = 100 << 20  # of a header: the most that safetensors allows
AGAIN = "download it again"


def keys_of(path: Path) -> list[str]:
    """The names of a file's weights. Raises ValueError with what is wrong with the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(len(POINTER))
            length = int.from_bytes(first[:LENGTH_BYTES], "little")
            file.seek(LENGTH_BYTES)
            text = file.read(length) if length <= min(size, MAX_BYTES) else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if first == POINTER:
        raise ValueError(f'{path} is a pointer of Git LFS, not the weights; run "git lfs pull" in its folder.')
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((info["data_offsets"][1] for info in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or its beginning is broken; {AGAIN}.") from error
    if size != LENGTH_BYTES + length + end:
        raise ValueError(
            f"{path} has {size} bytes and should have {LENGTH_BYTES + length + end}: it is incomplete; {AGAIN}."
        )
    return list(header)
