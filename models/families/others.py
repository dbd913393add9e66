"""Families of one model each."""

from ..architecture import Architecture, PerToken, Stack

KANDINSKY5 = Architecture(
    networks=("comfy.ldm.kandinsky5.model.Kandinsky5",),
    stacks=(
        Stack(
            "visual_transformer_blocks",
            image="visual_embed",
            tokens=(PerToken("freqs", "image", 1), PerToken("text_embed", "text", 1)),
            attention=("image", "cross"),
            modulation=("visual_modulation",),
        ),
    ),
    width="model_dim",
    patch=("patch_size",),
    heads="visual_transformer_blocks.0.self_attention.num_heads",
)
COSMOS_PREDICT2 = Architecture(  # and Anima
    networks=("comfy.ldm.cosmos.predict2.MiniTrainDIT",),
    stacks=(
        Stack(
            "blocks",
            image="x_B_T_H_W_D",
            tokens=(
                PerToken("rope_emb_L_1_1_D", "image", 1),
                PerToken("emb_B_T_D", "frames", 1),
                PerToken("adaln_lora_B_T_3D", "frames", 1),
                PerToken("crossattn_emb", "text", 1),
            ),
            attention=("image", "cross"),
            modulation=("adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp"),
        ),
    ),
    width="model_channels",
    patch=("patch_temporal", "patch_spatial", "patch_spatial"),
)
AURAFLOW = Architecture(
    networks=("comfy.ldm.aura.mmdit.MMDiT",),
    stacks=(
        Stack(
            "double_layers",
            key="double_block",
            image="x",
            text="c",
            returns=("c", "x"),
            order="text image",
            modulation=("modC", "modX"),
        ),
        Stack(
            "single_layers",
            key="single_block",
            image="cx",
            order="text image",
            modulation=("modCX",),
        ),
    ),
    width="cond_seq_linear.out_features",
    heads="double_layers.0.attn.n_heads",
)
OMNIGEN2 = Architecture(
    networks=("comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",),
    stacks=(
        Stack(
            "layers",
            image="hidden_states",
            order="text image",
            tokens=(PerToken("image_rotary_emb", "sequence", 1),),
            modulation=("norm1.linear",),
        ),
    ),
    heads="layers.0.attn.heads",
    whole=True,
)
KREA2 = Architecture(
    networks=("comfy.ldm.krea2.model.SingleStreamDiT",),
    stacks=(
        Stack(
            "blocks",
            image="x",
            order="text image",
            tokens=(PerToken("freqs", "sequence", 2),),
            modulation=("mod",),
        ),
    ),
    width="first.out_features",
    patch=("patch", "patch"),
    heads="heads",
    whole=True,
)
IDEOGRAM4 = Architecture(
    networks=("comfy.ldm.ideogram4.model.Ideogram4Transformer",),
    stacks=(
        Stack(
            "layers",
            image="x",
            order="text image",
            tokens=(PerToken("freqs_cis", "sequence", 1),),
            modulation=("adaln_modulation",),
        ),
    ),
    width="layers.0.attention.hidden_size",
    patch=(1, 1),
    heads="layers.0.attention.num_heads",
    whole=True,
)
JOYIMAGE = Architecture(
    networks=("comfy.ldm.joyimage.model.JoyImageTransformer3DModel",),
    stacks=(
        Stack(
            "double_blocks",
            key="double_block",
            image="hidden_states",
            text="encoder_hidden_states",
            returns=("hidden_states", "encoder_hidden_states"),
            order="image text",
            tokens=(PerToken("image_rotary_emb", "image", 1),),
            modulation=("img_mod", "txt_mod"),
        ),
    ),
    width="img_in.out_channels",
    patch=("patch_size",),
    heads="double_blocks.0.attn.num_attention_heads",
)
LENS = Architecture(
    networks=("comfy.ldm.lens.model.LensTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            key="double_block",
            image="hidden_states",
            text="encoder_hidden_states",
            returns=("encoder_hidden_states", "hidden_states"),
            order="image text",
            tokens=(PerToken("freqs_cis", "sequence", 2), PerToken("attention_mask", "mask", 3)),
            modulation=("img_mod", "txt_mod"),
        ),
    ),
    width="inner_dim",
    patch=(1, 1),
    heads="transformer_blocks.0.attn.heads",
    padding="right",
)
BOOGU = Architecture(
    networks=("comfy.ldm.boogu.model.BooguTransformer2DModel",),
    stacks=(
        Stack(
            "double_stream_layers",
            image="img_hidden_states",
            text="instruct_hidden_states",
            returns=("img_hidden_states", "instruct_hidden_states"),
            order="text image",
            tokens=(PerToken("joint_rotary_emb", "sequence", 1), PerToken("img_rotary_emb", "image", 1)),
            attention=("sequence", "image"),
        ),
        Stack(
            "single_stream_layers",
            image="hidden_states",
            order="text image",
            tokens=(PerToken("image_rotary_emb", "sequence", 1),),
        ),
    ),
    heads="single_stream_layers.0.attn.heads",
)
OWN_ATTENTION = "its attention cannot be replaced"
PIXART = Architecture(
    networks=("comfy.ldm.pixart.pixartms.PixArtMS",),
    stacks=(
        Stack(
            "blocks",
            image="x",
            tokens=(PerToken("y", "text", 1),),
            attention=("image", "cross"),
        ),
    ),
    refuses={technique: OWN_ATTENTION for technique in ("attention", "compile", "parallel", "sparse")},
)
ERNIE = Architecture(
    networks=("comfy.ldm.ernie.model.ErnieImageModel",),
    stacks=(
        Stack(
            "layers",
            image="x",
            order="image text",
            tokens=(PerToken("rotary_pos_emb", "sequence", 1),),
        ),
    ),
    whole=True,
    refuses={technique: OWN_ATTENTION for technique in ("attention", "compile", "parallel", "sparse")},
)
OTHERS = (
    KANDINSKY5,
    COSMOS_PREDICT2,
    AURAFLOW,
    OMNIGEN2,
    KREA2,
    IDEOGRAM4,
    JOYIMAGE,
    LENS,
    BOOGU,
    PIXART,
    ERNIE,
)
