"""Models of images that diffusers judges. Conventions are those of diffusers' pipelines, which each function names."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from judge import Case, Given, randoms
from torch import Tensor, nn

SIGMA = torch.tensor([0.7])
GUIDANCE = torch.tensor([3.5])
TEXT = 12


def ids(height: int, width: int, axes: int, first: int = 0) -> Tensor:
    """Positions of an image's tokens (height * width, axes): first, row, column."""
    at = torch.zeros(height, width, axes)
    at[..., 0], at[..., 1], at[..., 2] = first, torch.arange(height)[:, None], torch.arange(width)
    return at.flatten(0, 1)


def packed(latent: Tensor) -> Tensor:
    """Tokens of 2 x 2: (B, C, H, W) -> (B, H * W / 4, 4 C), as FluxPipeline._pack_latents."""
    tokens = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return tokens.flatten(3).flatten(1, 2)


def unpacked(height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The image's part of the output as ComfyUI has it; what comes after it is of reference images."""

    def image(tokens: Tensor) -> Tensor:
        of_image = tokens[:, : height * width // 4].unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
        return of_image.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    return image


def flux(guidance: bool, reference: bool = False) -> Callable:
    """FluxPipeline (reference: FluxKontextPipeline): time sigma and the guidance's scale in both; text at 0, 0, 0."""

    def inputs() -> tuple[Given, Given]:
        latent, text, pooled, other = randoms((1, 16, 12, 10), (1, TEXT, 48), (1, 64), (1, 16, 8, 8))
        theirs: Given = dict(
            hidden_states=packed(latent), encoder_hidden_states=text, pooled_projections=pooled, timestep=SIGMA,
            img_ids=ids(6, 5, 3), txt_ids=torch.zeros(TEXT, 3), guidance=GUIDANCE if guidance else None,
        )  # fmt: skip
        ours: Given = dict(x=latent, timestep=SIGMA, context=text, y=pooled, guidance=GUIDANCE)
        if reference:
            theirs["hidden_states"] = torch.cat((packed(latent), packed(other)), dim=1)
            theirs["img_ids"] = torch.cat((ids(6, 5, 3), ids(4, 4, 3, first=1)))
            ours["ref_latents"] = [other]
        return theirs, ours

    return inputs


def flux2(guidance: bool) -> Callable:
    """Flux2Pipeline (without guidance: Flux2KleinPipeline): as FLUX.1, a token a latent pixel, text along the fourth
    axis."""

    def inputs() -> tuple[Given, Given]:
        latent, text = randoms((1, 128, 6, 5), (1, TEXT, 48))
        of_text = torch.zeros(1, TEXT, 4)
        of_text[..., 3] = torch.arange(TEXT)
        theirs: Given = dict(
            hidden_states=latent.flatten(2).transpose(1, 2), encoder_hidden_states=text, timestep=SIGMA,
            img_ids=ids(6, 5, 4)[None], txt_ids=of_text, guidance=GUIDANCE if guidance else None,
        )  # fmt: skip
        return theirs, dict(x=latent, timestep=SIGMA, context=text, guidance=GUIDANCE)

    return inputs


def chroma() -> tuple[Given, Given]:
    """ChromaPipeline: as FLUX.1, with guidance 0."""
    latent, text = randoms((1, 16, 12, 10), (1, TEXT, 48))
    theirs: Given = dict(
        hidden_states=packed(latent), encoder_hidden_states=text, timestep=SIGMA, img_ids=ids(6, 5, 3),
        txt_ids=torch.zeros(TEXT, 3),
    )  # fmt: skip
    return theirs, dict(x=latent, timestep=SIGMA, context=text, guidance=torch.zeros(1))


def qwen_image(kept: int = TEXT, reference: bool = False) -> Callable:
    """QwenImagePipeline (reference: QwenImageEditPlusPipeline): time sigma in both. With an odd number of rows or
    columns of tokens the two differ: their middle is row (N - 1) / 2 in ComfyUI, (N + 1) / 2 in diffusers."""

    def inputs() -> tuple[Given, Given]:
        latent, text, other = randoms((1, 16, 1, 12, 8), (1, TEXT, 48), (1, 16, 1, 8, 8))
        mask = (torch.arange(TEXT) < kept)[None]
        tokens, shapes = packed(latent[:, :, 0]), [(1, 6, 4)]
        theirs: Given = dict(encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=SIGMA)
        ours: Given = dict(x=latent, timestep=SIGMA, context=text, attention_mask=mask.long())
        if reference:
            tokens, shapes = torch.cat((tokens, packed(other[:, :, 0])), dim=1), [*shapes, (1, 4, 4)]
            ours["ref_latents"] = [other]
        return theirs | dict(hidden_states=tokens, img_shapes=[shapes]), ours

    return inputs


def one_frame(tokens: Tensor) -> Tensor:
    return unpacked(12, 8)(tokens)[:, :, None]


def z_image(length: int) -> Callable:
    """ZImagePipeline: time 1 - sigma there, and the output is the opposite of ComfyUI's. Both pad text and image to
    multiples of 32."""

    def inputs() -> tuple[Given, Given]:
        latent, text = randoms((1, 16, 12, 10), (1, length, 48))
        theirs: Given = dict(x=[latent[0][:, None]], t=1 - SIGMA, cap_feats=[text[0]])
        return theirs, dict(x=latent, timesteps=SIGMA, context=text, num_tokens=length)

    return inputs


def z_image_time(network: nn.Module) -> None:
    """ComfyUI's Z-Image has its time embedder as wide as the model where that is narrower than 1024."""
    network.t_embedder = TimestepEmbedder(256, mid_size=384)


def lumina2() -> tuple[Given, Given]:
    """Lumina2Pipeline: time 1 - sigma there, and the output is the opposite of ComfyUI's."""
    latent, text = randoms((1, 16, 12, 10), (1, TEXT, 48))
    theirs: Given = dict(
        hidden_states=latent, timestep=1 - SIGMA, encoder_hidden_states=text,
        encoder_attention_mask=torch.ones(1, TEXT, dtype=torch.bool),
    )  # fmt: skip
    return theirs, dict(x=latent, timesteps=SIGMA, context=text, num_tokens=TEXT)


def sd3() -> tuple[Given, Given]:
    """StableDiffusion3Pipeline: timestep sigma * 1000 in both."""
    latent, text, pooled = randoms((1, 16, 12, 10), (1, TEXT, 48), (1, 64))
    theirs: Given = dict(
        hidden_states=latent, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * SIGMA
    )
    return theirs, dict(x=latent, timesteps=1000 * SIGMA, context=text, y=pooled)


def hidream() -> tuple[Given, Given]:
    """HiDreamImagePipeline: timestep sigma * 1000 in both, and the output is the opposite of ComfyUI's. A square image:
    diffusers pads others."""
    latent, text, llama, pooled = randoms((1, 16, 8, 8), (1, TEXT, 48), (1, 3, TEXT, 40), (1, 64))
    theirs: Given = dict(
        hidden_states=latent, timesteps=1000 * SIGMA, encoder_hidden_states_t5=text,
        encoder_hidden_states_llama3=llama.transpose(0, 1), pooled_embeds=pooled,
    )  # fmt: skip
    ours: Given = dict(x=latent, t=1000 * SIGMA, y=pooled, context=text, encoder_hidden_states_llama3=llama)
    return theirs, ours | dict(image_cond=None)


def aura_flow() -> tuple[Given, Given]:
    """AuraFlowPipeline: time sigma in both."""
    latent, text = randoms((1, 4, 12, 8), (1, TEXT, 2048))
    theirs: Given = dict(hidden_states=latent, encoder_hidden_states=text, timestep=SIGMA)
    return theirs, dict(x=latent, timestep=SIGMA, context=text)


def pixart() -> tuple[Given, Given]:
    """PixArtSigmaPipeline: the same timestep in both; diffusers' output has the variance behind, which is not used."""
    latent, text = randoms((1, 4, 64, 64), (1, TEXT, 4096))
    theirs: Given = dict(hidden_states=latent, encoder_hidden_states=text, timestep=1000 * SIGMA)
    return theirs, dict(x=latent, timesteps=1000 * SIGMA, context=text)


TWO: dict[str, Any] = dict(num_layers=2, num_attention_heads=2, joint_attention_dim=48)
FLUX = TWO | dict(num_single_layers=2, pooled_projection_dim=64)
FLUX2 = TWO | dict(num_single_layers=2)
QWEN_SIZES = dict(num_attention_heads=2, joint_attention_dim=48)
HIDREAM: dict[str, Any] = dict(
    num_layers=1, num_single_layers=1, num_attention_heads=2, caption_channels=[48, 40], text_emb_dim=64,
    num_routed_experts=2, num_activated_experts=1, llama_layers=[0, 2],
)  # fmt: skip
LUMINA_SIZES = dict(
    n_heads=4, n_kv_heads=2, axes_dims=[32] * 3, axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0
)
Z_SIZES = dict(
    n_heads=3, n_kv_heads=3, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
    ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
SD3: dict[str, Any] = dict(
    sample_size=32, num_layers=4, num_attention_heads=4, attention_head_dim=64, joint_attention_dim=48,
    caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=24,
)  # fmt: skip

CASES = {
    "FLUX.1 dev": Case("FluxTransformer2DModel", FLUX | dict(guidance_embeds=True), flux(True), unpacked(12, 10)),
    "FLUX.1 schnell": Case("FluxTransformer2DModel", FLUX, flux(False), unpacked(12, 10)),
    "FLUX.1 Kontext": Case(
        "FluxTransformer2DModel", FLUX | dict(guidance_embeds=True), flux(True, reference=True), unpacked(12, 10)
    ),
    "FLUX.2 dev": Case(
        "Flux2Transformer2DModel", FLUX2, flux2(True), lambda tokens: tokens.transpose(1, 2).unflatten(2, (6, 5))
    ),
    "FLUX.2 klein": Case(
        "Flux2Transformer2DModel",
        FLUX2 | dict(guidance_embeds=False),
        flux2(False),
        lambda tokens: tokens.transpose(1, 2).unflatten(2, (6, 5)),
    ),
    "Qwen-Image": Case("QwenImageTransformer2DModel", TWO, qwen_image(), one_frame, sizes=QWEN_SIZES),
    "Qwen-Image, padded text": Case(
        "QwenImageTransformer2DModel", TWO, qwen_image(kept=9), one_frame, sizes=QWEN_SIZES
    ),
    "Qwen-Image Edit": Case(
        "QwenImageTransformer2DModel", TWO, qwen_image(reference=True), one_frame, sizes=QWEN_SIZES
    ),
    "Qwen-Image Edit 2511": Case(
        "QwenImageTransformer2DModel",
        TWO | dict(zero_cond_t=True),
        qwen_image(reference=True),
        one_frame,
        sizes=QWEN_SIZES,
    ),
    "Z-Image": Case(
        "ZImageTransformer2DModel",
        dict(dim=384, n_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=48),
        z_image(TEXT),
        lambda outputs: -outputs[0].transpose(0, 1),
        fit=z_image_time,
        sizes=Z_SIZES,
    ),
    "SD3": Case("SD3Transformer2DModel", SD3, sd3),
    "SD3.5 large": Case("SD3Transformer2DModel", SD3 | dict(qk_norm="rms_norm"), sd3),
    "SD3.5 medium": Case(
        "SD3Transformer2DModel", SD3 | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)), sd3
    ),
    "Lumina 2": Case(
        "Lumina2Transformer2DModel",
        dict(
            hidden_size=384, num_attention_heads=4, num_kv_heads=2, num_layers=2, cap_feat_dim=48,
            ffn_dim_multiplier=1.0,
        ),
        lumina2,
        lambda output: -output,
        sizes=LUMINA_SIZES,
    ),
    "HiDream": Case(
        "HiDreamImageTransformer2DModel",
        HIDREAM | dict(patch_size=2, in_channels=16, out_channels=16, axes_dims_rope=(64, 32, 32)),
        hidream,
        lambda output: -output,
        sizes=HIDREAM,
    ),
    "AuraFlow": Case(
        "AuraFlowTransformer2DModel",
        dict(
            num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=128, num_attention_heads=2,
            joint_attention_dim=2048, caption_projection_dim=256,
        ),
        aura_flow,
        sizes=dict(dim=256, n_heads=2, global_conddim=256),
    ),
    "PixArt Sigma": Case(  # as wide as released: ComfyUI counts on it
        "PixArtTransformer2DModel",
        dict(num_layers=1, sample_size=64, caption_channels=4096, use_additional_conditions=False),
        pixart,
        lambda output: output.chunk(2, dim=1)[0],
    ),
    "Chroma": Case(  # as deep as released: ComfyUI counts on it
        "ChromaTransformer2DModel",
        dict(num_attention_heads=1, joint_attention_dim=48, approximator_hidden_dim=64, approximator_layers=2),
        chroma,
        unpacked(12, 10),
        sizes=dict(out_dim=128, hidden_dim=64, n_layers=2),
    ),
}  # fmt: skip
