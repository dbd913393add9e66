"""What a kernel is. Letters: B batch, H heads, S tokens, D head dim."""

import importlib.util
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 26  # scores computed at a time where no kernel does it
HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """What has to be computed: the device, type and sizes of q, k and v."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    tokens: int

    @staticmethod
    def of(q: Tensor) -> "Problem":
        """The problem of queries (B, H, S, D)."""
        return Problem(q.device, q.dtype, q.shape[1], q.shape[3], q.shape[2])

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None where this is no NVIDIA GPU."""
        if self.device.type != "cuda" or torch.version.cuda is None:
            return None
        return torch.cuda.get_device_capability(self.device)


@dataclass(frozen=True)
class Kernel:
    """An attention kernel.

    name: as in plan.KERNELS. exact: computes in the type of its inputs, not in 8 bits.
    obstacle: why it cannot run a problem, in words; None if it can.
    run: (B, H, S, D) queries, keys and values, any strides, to a (B, S, H, D) output.
    run_with_lse: the same with a number of multiprocessors that a kernel which would take all to its end leaves to
        others; to the output and the log-sum-exp of the scores, (B, H, S) in float32. None if it cannot.
    """

    name: str
    label: str
    exact: bool
    obstacle: Callable[[Problem], str | None]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    run_with_lse: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None


def package_obstacle(module: str, package: str) -> str | None:
    """Why a package cannot be used; None if it is installed."""
    try:  # of a dotted name the parent is imported
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    except Exception as error:  # built for another PyTorch, or what else its import meets
        return f"{package} cannot be imported ({str(error).partition(chr(10))[0]})"
    return None if found else f"{package} is not installed"


def input_obstacle(problem: Problem, label: str, head_dims: Container[int]) -> str | None:
    """Why a kernel for 16-bit inputs cannot take a problem's type or head dim; None if it can."""
    if problem.dtype not in HALF_TYPES:
        return f"{label} does not compute in {problem.dtype}"
    if problem.head_dim not in head_dims:
        return f"{label} does not take heads of size {problem.head_dim}"
    return None


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a function of the FlashAttention packages: some return the log-sum-exp as well."""
    return out[0] if isinstance(out, tuple) else out


def plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What Kernel.run_with_lse gives, computed in float32 and in pieces of the queries, on any device."""
    keys, values = k.float().transpose(-1, -2), v.float()
    piece = max(CHUNK // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    outs, sums = [], []
    for part in q.split(piece, dim=2):
        scores = part.float() @ keys * q.shape[-1] ** -0.5
        lse = torch.logsumexp(scores, dim=-1)
        sums.append(lse)
        outs.append((scores - lse.unsqueeze(-1)).exp() @ values)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q.dtype), torch.cat(sums, dim=2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is written down, in float32: (B, H, S, D) to (B, S, H, D). For checks on small slices."""
    q, k, v = q.float(), k.float(), v.float()
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)
