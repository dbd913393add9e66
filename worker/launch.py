"""What ComfyUI starts: PyTorch's launcher in a process that ends, with all workers, when ComfyUI does.

    python launch.py <arguments of torchrun>

Runs as a script and imports nothing of the pack. ComfyUI holds the other end of its standard input: the operating
system closes it however ComfyUI ends, and that ends this process. Workers see this process go and end too
(bootstrap.py).
"""

import os
import sys
import threading

LAUNCHER_KEY = "SKEIN_LAUNCHER_PID"


def end_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ[LAUNCHER_KEY] = str(os.getpid())
    from torch.distributed.run import main

    main(sys.argv[1:])
