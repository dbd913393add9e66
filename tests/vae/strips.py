"""Every rank decodes its strip, and the whole as ComfyUI does; rank 0 prints how far these are apart. For torchrun."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from pack import load_pack

load_pack()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import vaes  # noqa: E402
from skein.parallel.mesh import split  # noqa: E402
from skein.vae.layers import computing  # noqa: E402
from skein.vae.strip import Strip, longer_side  # noqa: E402

# (B, T, H, W) of the latent: odd sizes, one frame, several, a batch, rows instead of columns.
SHAPES = [(1, 1, 2, 5), (1, 3, 3, 5), (1, 4, 7, 2), (2, 5, 2, 4)]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in vaes.FAMILIES:
        model = vaes.build(name)
        for shape in SHAPES:
            z = vaes.latent(name, shape)
            whole, dim = model.decode(z), longer_side(z)
            strip = Strip(dim, tuple(split(z.shape[dim], world)), rank)
            counted = []
            with computing(model.decoder, strip, lambda: None, counted.append):
                part = model.decode(strip.cut(z))
            scale = whole.shape[dim] // z.shape[dim]
            first = scale * sum(strip.parts[:rank])
            mine = whole.narrow(dim, first, scale * strip.parts[rank])
            naive = model.decode(strip.cut(z))
            found = torch.tensor([
                float((part - mine).abs().max()), -float((naive - mine).abs().max()), -float(whole.std()),
                float(not torch.equal(model.decode(z), whole)), float(sum(counted) < whole.shape[2]),
            ])  # fmt: skip
            dist.all_reduce(found, dist.ReduceOp.MAX)
            if rank == 0:
                names = ("difference", "without", "scale", "left_behind", "frames_missing")
                print(json.dumps({"family": name, "shape": shape, **dict(zip(names, found.tolist()))}), flush=True)
    dist.barrier()
    dist.destroy_process_group()  # left to the end of the process, gloo's threads now and then abort it


if __name__ == "__main__":
    with torch.inference_mode():
        main()
