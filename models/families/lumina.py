"""Lumina 2 and Z-Image: text and image in one sequence in all blocks."""

from ..architecture import Architecture, PerToken, Stack

LUMINA = Architecture(
    networks=("comfy.ldm.lumina.model.NextDiT",),
    stacks=(
        Stack(
            "layers",
            image="x",
            order="text image",
            tokens=(PerToken("freqs_cis", "sequence", 1),),
            modulation=("adaLN_modulation",),
        ),
    ),
    width="dim",
    heads="n_heads",
    whole=True,
)
