"""Where compiled code lies between runs and starts of ComfyUI: PyTorch's own folder, which nobody else may write into.

PyTorch unpickles and runs what it finds there. Its folder has a name that others can foresee, in a place where
everybody may make folders; and some of its caches are there even where TORCHINDUCTOR_CACHE_DIR names another one.
"""

import os


def require_own_folder() -> None:
    """Have PyTorch's folder for its owner only. Raises ValueError if it is another user's, OSError if there is none.

    On Windows each user has a folder for temporary files that is closed to others.
    """
    if not hasattr(os, "getuid"):
        return
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    folder = default_cache_dir()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if {os.lstat(folder).st_uid, os.stat(folder).st_uid} != {os.getuid()}:  # of a link, and of what it leads to
        raise ValueError(
            f"{folder} belongs to another user, who could put code there for PyTorch to run; remove it, or start "
            "ComfyUI with TMPDIR set to a folder of your own"
        )
    os.chmod(folder, 0o700)
