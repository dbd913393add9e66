"""What Skein has to know of a diffusion transformer, as data.

A model is a page: an `Architecture` in models/families. All names are ComfyUI's: paths of modules, and parameters of
a block's forward and of the network's.

Where text and image are one sequence, inside of attention or in the blocks too, they lie in it so ("text image"; T text
tokens, S image tokens), and so on each of two ranks that share the image:

    whole    | t0 .. tT | i0 .. .. .. .. iS |
    rank 0   | t0 .. tT | i0 .. |
    rank 1   | t0 .. tT |         .. .. iS  |

Letters: B batch, T text tokens, S image tokens, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PerToken:
    """A parameter that has an entry for each token, or a tuple of such.

    of: what its tokens are: "image", "text", "sequence" (both, in the stack's order); "frames": one entry for all, one
    a frame or one a token; "ranges": ComfyUI's list of (first token, end, which); "index": a number, the first image
    token of another kind; "mask": added to the scores over the sequence.
    dim: the dimension that counts tokens.
    """

    name: str
    of: str
    dim: int = 0


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    blocks: path of their ModuleList in the network.
    key: their kind in ComfyUI's patches_replace["dit"]; "" where ComfyUI has none.
    image: parameter with the image's tokens (B, S, C), alone or in one sequence with the text; or a tuple of several
        streams of tokens.
    text: parameter with the text's tokens, where the block changes them apart from the image.
    returns: what forward returns, in order, as the parameters whose place it takes; () for the image alone.
    order: of text and image where they are one sequence: "text image", "image text"; "" where they never are.
    tokens: the other parameters with an entry for each token.
    attention: what the block's attentions go over, in the order of their calls: "sequence", "image" or "cross" (from
        the image to something that each rank has whole). The last one stands for all that follow.
    parameters: names of positional parameters that forward does not name.
    rope: parameter with rotary factors (B, 1, T + S, D / 2, 2, 2) that may be None: the block's attention then turns
        queries and keys by them.
    modulation: parts of a block that compute shifts and scales.
    queries: layers that compute queries, keys and values of the image and of text beside it, and nothing else in their
        first 3 * C channels. A block with these, whose first attention alone mixes tokens, can run in slices.
    """

    blocks: str
    image: str
    key: str = ""
    text: str = ""
    returns: tuple[str, ...] = ()
    order: str = ""
    tokens: tuple[PerToken, ...] = ()
    attention: tuple[str, ...] = ("sequence",)
    parameters: tuple[str, ...] = ()
    rope: str = ""
    modulation: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """What forward returns, as parameters."""
        return self.returns or (self.image,)


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    networks: classes of ComfyUI, by module and name; their subclasses are meant too.
    stacks: the blocks in running order.
    width: attribute of the network with C.
    patch: the size of a token in each of the latent's last dimensions: numbers, or attributes of the network that hold
        one or several.
    heads: attribute of the network with the number of attention heads, or of a module in it.
    padding: whether text that the network's `attention_mask` hides may be cut off its `context`: "any"; "right" where
        it is at the end; "" if the model attends to it.
    whole: text and image are one sequence in all blocks, and no block tells them apart.
    beside: blocks that run between those of the stacks.
    threshold: of the First-Block Cache where the user names none; a page says where it comes from. The default is that
        of diffusers' FirstBlockCacheConfig.
    after: path of the module that takes the image after the last block, where the network counts the tokens before.
    refuses: techniques (fields of the plan) that cannot work with these models -> why, as the end of "because ...".
    """

    networks: tuple[str, ...]
    stacks: tuple[Stack, ...]
    width: str = "hidden_size"
    patch: tuple[str | int, ...] = ("patch_size", "patch_size")
    heads: str = "num_heads"
    padding: str = ""
    whole: bool = False
    beside: tuple[Stack, ...] = ()
    after: str = ""
    threshold: float = 0.05
    refuses: Mapping[str, str] = field(default_factory=dict)
