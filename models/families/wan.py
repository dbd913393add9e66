"""Wan 2.1 and 2.2, text and image to video, Fun, Camera and VACE: the image attends to itself, then to the text."""

from ..architecture import Architecture, PerToken, Stack

TOKENS = (PerToken("freqs", "image", 1), PerToken("e", "frames", -3), PerToken("context", "text", 1))
QUERIES = "self_attn.q", "self_attn.k", "self_attn.v"
BLOCK = Stack(
    "blocks",
    key="double_block",
    image="x",
    tokens=TOKENS,
    attention=("image", "cross"),
    queries=QUERIES,
)
# VACE's, which run between the others and give each of them something to add.
VACE_BLOCK = Stack(
    "vace_blocks",
    image="c",
    returns=("c_skip", "c"),
    tokens=(PerToken("x", "image", 1), *TOKENS),
    attention=("image", "cross"),
    queries=QUERIES,
)

THRESHOLD = 0.03  # ParaAttention's default for Wan 2.1
WAN = Architecture(
    networks=("comfy.ldm.wan.model.WanModel",),
    stacks=(BLOCK,),
    width="dim",
    patch=("patch_size",),
    threshold=THRESHOLD,
)
VACE = Architecture(
    networks=("comfy.ldm.wan.model.VaceWanModel",),
    stacks=(BLOCK,),
    width="dim",
    patch=("patch_size",),
    threshold=THRESHOLD,
    beside=(VACE_BLOCK,),
)
WHOLE_FRAMES = "between its blocks it works on whole frames"
ALL_FRAMES = Architecture(
    networks=(
        "comfy.ldm.wan.model.WanModel_S2V",
        "comfy.ldm.wan.model.HumoWanModel",
        "comfy.ldm.wan.model_animate.AnimateWanModel",
        "comfy.ldm.wan.model_wandancer.WanDancerModel",
    ),
    stacks=(BLOCK,),
    width="dim",
    patch=("patch_size",),
    threshold=THRESHOLD,
    refuses={"parallel": WHOLE_FRAMES},
)
ONE_BY_ONE = "it makes its frames one after another, with a memory of its own"
CAUSAL = Architecture(
    networks=("comfy.ldm.wan.ar_model.CausalWanModel",),
    stacks=(BLOCK,),
    width="dim",
    patch=("patch_size",),
    threshold=THRESHOLD,
    refuses={technique: ONE_BY_ONE for technique in ("cache", "attention", "compile", "parallel", "sparse")},
)
