"""FLUX's blocks: text and image apart, then in one sequence.

HunyuanVideo, SkyReels, HunyuanVideo 1.5 (text and image apart in all blocks) and HunyuanImage 2.1 have them, one class
in ComfyUI; FLUX.1, Kontext, FLUX.2 and Klein, another; and Chroma.
"""

from ..architecture import Architecture, PerToken, Stack

DOUBLE = Stack(
    "double_blocks",
    key="double_block",
    image="img",
    text="txt",
    returns=("img", "txt"),
    order="text image",
    tokens=(PerToken("pe", "sequence", 2), PerToken("modulation_dims_img", "ranges")),
    rope="pe",
    modulation=("img_mod", "txt_mod"),
    queries=("img_attn.qkv", "txt_attn.qkv"),
)
SINGLE = Stack(
    "single_blocks",
    key="single_block",
    image="x",
    order="text image",
    tokens=(PerToken("pe", "sequence", 2), PerToken("modulation_dims", "ranges")),
    rope="pe",
    modulation=("modulation",),
    queries=("linear1",),
)
HUNYUAN_VIDEO = Architecture(
    networks=("comfy.ldm.hunyuan_video.model.HunyuanVideo",),
    stacks=(DOUBLE, SINGLE),
    patch=("patch_size",),
    padding="any",
    threshold=0.06,  # ParaAttention's article on HunyuanVideo
)
FLUX = Architecture(
    networks=("comfy.ldm.flux.model.Flux", "comfy.ldm.chroma.model.Chroma"),
    stacks=(DOUBLE, SINGLE),
    threshold=0.08,  # ParaAttention's article on FLUX.1 dev
)
