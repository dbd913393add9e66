"""Where the memory of a VAE decode goes: the bytes of all tensors alive, counted operator by operator, not computed.

    python3 -m bench.vae_memory [--width 1280 --height 720 --frames 129] [--family HunyuanVideo]

The decoder has its true size and lies on PyTorch's meta device, so any size is counted in seconds on any machine. Not
counted: the weights, and what a kernel takes beside its inputs and outputs (cuDNN's workspace); the attention of the
middle block is left out. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench.vae import FAMILIES  # noqa: E402
from skein.vae.deferred import Deferred, step_of, whole_steps  # noqa: E402
from skein.vae.layers import computing  # noqa: E402
from skein.vae.slices import WHOLE, Carried, computing_in_slices  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Within: counts the bytes of the tensors that operators have made and that are alive.

    peak: the most at a time. at_peak: bytes of those then alive by shape, operator and type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.at_peak = 0, Counter[str]()
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._noted = 0  # bytes, with those that are no longer alive since this was last looked at

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Deferred):  # of what it is made where this mode does not look
                for step in whole_steps(step_of(tensor)):
                    self._note(step.tensor, "kept")
            elif isinstance(tensor, Tensor):
                self._note(tensor, str(func))
        if self._noted > self.peak:
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
            self._noted = sum(size for _, size, _ in self._alive.values())
        if self._noted > self.peak:
            self.peak, self.at_peak = self._noted, Counter()
            for _, size, name in self._alive.values():
                self.at_peak[name] += size
        return out

    def _note(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is None or known[0].expired():
            self._noted += storage.nbytes() - (known[1] if known else 0)
            name = f"{tuple(tensor.shape)} {operator} {tensor.dtype}"
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), name


def counted(model: nn.Module, latent: Tensor, within: Callable[[], AbstractContextManager]) -> LiveBytes:
    """What a decode has alive, inside of a context."""
    attend = [
        (module, "optimized_attention", lambda q, k, v: torch.empty_like(v))
        for module in model.modules()
        if "optimized_attention" in vars(module)
    ]
    with changed(attend), within(), LiveBytes() as live:
        model.decode(latent)
    return live


def ways(decoder: nn.Module) -> dict[str, Callable[[], AbstractContextManager]]:
    def nothing(*_: object) -> None:
        pass

    return {
        "ComfyUI": nullcontext,
        "Skein, whole": lambda: computing(decoder, WHOLE, nothing, nothing),
        "Skein, in slices": lambda: computing_in_slices(decoder, nothing, nothing),
        "Skein, carried frames on the host": lambda: computing_in_slices(decoder, nothing, nothing, Carried(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=1280, height=720, frames=129).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--family", choices=list(FAMILIES), default="HunyuanVideo")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()
    with torch.device("meta"), torch.inference_mode():
        model: Any = FAMILIES[options.family]().to(getattr(torch, options.dtype)).eval()
        channels, side = (32, 16) if options.family == "HunyuanVideo 1.5" else (16, 8)
        shape = (1, channels, (options.frames + 3) // 4, options.height // side, options.width // side)
        latent, peaks = torch.empty(shape, dtype=getattr(torch, options.dtype)), {}
        for name, within in ways(model.decoder).items():
            live = counted(model, latent, within)
            peaks[name] = live.peak / GIB
            print(f"{name}: {live.peak / GIB:.2f} GiB")
            for what, size in live.at_peak.most_common(12):
                if size > GIB / 100:
                    print(f"    {size / GIB:6.2f}  {what}")
    print(json.dumps({"sizes": vars(options), "peak_gib": peaks}))


if __name__ == "__main__":
    main()
