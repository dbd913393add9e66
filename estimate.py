"""What sampling takes of each GPU's memory, told before it begins.

The work of a call peaks in a block's perceptron, so it grows with the tokens that a GPU has, and with their width. The
factors were fitted to peaks measured on a GPU (bench/memory.py prints both beside each other).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .models import Network
from .plan import Plan

# Hidden states (tokens x width values) that a call holds at its peak, by how the blocks run.
EAGER, COMPILED, COMPILED_FP8 = 14.2, 15.7, 17.1
# The same where the blocks run in slices of tokens: what a block holds beside them (hidden states, queries, keys,
# values, rotary factors), and what its attention takes, over all tokens as ever.
BESIDE_SLICES, ATTENTION = 4.2, 5.7
EIGHT_BIT = 1.5  # more for queries, keys and values in 8 bits
SLICES = 16  # with more of them the attention takes no less
FEWEST_TOKENS = 1024  # in a slice: fewer leave a GPU waiting
KEPT = 1.07  # for each that the cache keeps, its signature counted
EXCHANGED = 2.0  # more on each of several GPUs: queries, keys and values on their way to the others
WHOLE = 1.6  # and of the whole video's tokens: as the first block is given them, and as the last one leaves them
FIXED = 20e6  # bytes: embedders, the latent
TEXT_TOKENS = 256  # where the text is not known
# What an allocator loses, in hidden states, to pieces between tensors that are too small for the next one: with whole
# blocks, whose widest tensor has five, and in slices. Measured with cudaMallocAsync, which ComfyUI uses
# (bench/dynamic_card.py).
LOST, LOST_IN_SLICES = 5.0, 2.2


@dataclass(frozen=True)
class Load:
    """The size of a model call. tokens: of the image; text: of the text; width: of a token; size: bytes of a value.

    batch: samples in a call, conditionings counted (ComfyUI batches them where memory allows).
    """

    tokens: int
    text: int
    width: int
    batch: int = 1
    size: int = 2

    @property
    def state(self) -> int:
        """Bytes of one token of a hidden state, in all samples."""
        return self.batch * self.width * self.size

    @classmethod
    def of(cls, network: Network, latent: Sequence[int], size: int) -> "Load":
        """A call of a model with a latent (B, C, ...)."""
        return cls(network.tokens(latent), TEXT_TOKENS, network.width, latent[0], size)


def work_of(network: Network, latent: Sequence[int]) -> float:
    """In proportion to the operations of a call on a latent (B, C, ...): products with the blocks' weights, of which a
    block with two streams has a half for the image, and attention of all tokens to all."""
    tokens = network.tokens(latent)
    products = sum(
        sum(weight.numel() for weight in block.module.parameters()) / (2 if block.stack.text else 1)
        for block in network.blocks
    )
    return latent[0] * (2 * products * tokens + 4 * tokens**2 * network.width * len(network.blocks))


def work_bytes(load: Load, plan: Plan, world: int = 1) -> float:
    """Bytes that sampling takes on each of `world` GPUs, without the weights."""
    state, own = load.state, load.tokens / world
    blocks = EAGER if plan.compile is None else COMPILED if plan.fp8 is None else COMPILED_FP8
    if plan.slices is not None:
        blocks = max(BESIDE_SLICES + (blocks - BESIDE_SLICES) / plan.slices.count, _attention(plan))
    kept = KEPT * (plan.cache.order + 1) if plan.cache and "cache" in plan.techniques else 0
    shared = own * EXCHANGED + load.tokens * WHOLE if world > 1 else 0
    return state * ((own + load.text) * blocks + own * kept + shared) + FIXED


def _attention(plan: Plan) -> float:
    """Hidden states that a block holds in its attention."""
    return ATTENTION + (EIGHT_BIT if plan.attention is not None and plan.attention.allow_8bit else 0)


def slices_for(load: Load, plan: Plan, total: float, world: int = 1) -> int:
    """How many slices of tokens the blocks should run in, where each of `world` GPUs has `total` bytes; 1 if a call has
    room as it is, be the weights wherever they are, or is too small to gain by it. Weights that come from the host's
    memory cost less time than slices (docs/LOG.md)."""
    if room_bytes(load, plan, world) <= total:
        return 1
    return max(min(SLICES, load.tokens // world // FEWEST_TOKENS), 1)


def room_bytes(load: Load, plan: Plan, world: int = 1) -> float:
    """Bytes that must be free on each of `world` GPUs before a call."""
    lost = LOST if plan.slices is None or plan.slices.count == 1 else LOST_IN_SLICES
    return work_bytes(load, plan, world) + load.state * (load.tokens / world + load.text) * lost


def advice(load: Load, plan: Plan, total: float, world: int = 1) -> str:
    """A sentence if a GPU of `total` bytes cannot do it, be the weights wherever they are; "" if it can."""
    need = work_bytes(load, plan, world)
    if need <= total:
        return ""
    less = "fewer frames, a smaller size" + (", no First-Block Cache" if plan.cache else "")
    more = f"more than {world} GPUs" if world > 1 else "several GPUs (Context Parallel)"
    return (
        f"Sampling needs about {need / 1e9:.0f} GB per GPU at this size, besides the model, and a GPU here has "
        f"{total / 1e9:.0f} GB; try {less} or {more}."
    )
