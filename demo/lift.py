"""The fixed linear lift from RGB video to 16-channel HunyuanVideo latents, for training without a VAE.

ComfyUI previews a latent as `rgb = latent @ latent_rgb_factors + bias`, in -1..1. The lift runs that
backwards: three latent directions carry the picture, so that the preview of a lifted video is the video.
The other thirteen, which the preview cannot see, carry what a VAE's other channels would carry: edges,
motion, the blurred picture, place and time. Every feature is linear in the video (or constant), so that no
channel is noise and nothing has to be learned.

Letters: B batch, T latent frames, H and W latent height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
# Rough inverse standard deviation of each hidden feature on random scenes, so that all weigh alike.
FEATURE_GAINS = (5.0, 5.0, 5.0, 4.0, 2.2, 2.2, 2.2, 3.0, 3.0, 3.0, 0.8, 0.8, 0.8)
HIDDEN_SCALE = 1.6  # share of the hidden features in a latent, so that a latent has about unit variance


class Lift:
    """Lifts RGB video to latents in the model's own space (after `process_in`), and back."""

    def __init__(self, rgb_factors: list[list[float]], rgb_bias: list[float], device: torch.device | str = "cpu"):
        factors = torch.tensor(rgb_factors, dtype=torch.float64)  # (16, 3)
        self.factors = factors.float().to(device)
        self.bias = torch.tensor(rgb_bias, dtype=torch.float32, device=device)
        self.visible = torch.linalg.pinv(factors).T.float().to(device)  # (16, 3): factors^T @ visible = identity
        hidden = torch.linalg.qr(factors, mode="complete").Q[:, 3:]  # (16, 13): factors^T @ hidden = 0
        # The sign of a QR column is the library's choice: fix it, so that every machine trains the same lift.
        signs = hidden.gather(0, hidden.abs().argmax(dim=0, keepdim=True)).sign()
        self.hidden = (hidden * signs).float().to(device)

    def encode(self, video: Tensor) -> Tensor:
        """RGB video (B, 3, T, H, W) in 0..1 to latents (B, 16, T, H, W)."""
        rgb = (video * 2 - 1) - self.bias.reshape(1, 3, 1, 1, 1)
        seen = torch.einsum("cr,brthw->bcthw", self.visible, rgb)
        return seen + HIDDEN_SCALE * torch.einsum("cf,bfthw->bcthw", self.hidden, hidden_features(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, T, H, W) to RGB video (B, T, H, W, 3) in 0..1, as ComfyUI previews them."""
        rgb = torch.einsum("bcthw,cr->bthwr", latents, self.factors) + self.bias
        return ((rgb + 1) / 2).clamp(0, 1)


def hidden_features(video: Tensor) -> Tensor:
    """What the preview does not show, (B, 13, T, H, W): edges, motion, two blurs of the picture, place, time."""
    batch, _, frames, height, width = video.shape
    luma = torch.einsum("brthw,r->bthw", video, torch.tensor(LUMA, device=video.device))
    across = F.pad(luma, (1, 1, 0, 0), mode="replicate")
    down = F.pad(luma, (0, 0, 1, 1), mode="replicate")
    edge_x = across[..., 2:] - across[..., :-2]
    edge_y = down[..., 2:, :] - down[..., :-2, :]
    laplacian = across[..., 2:] + across[..., :-2] + down[..., 2:, :] + down[..., :-2, :] - 4 * luma
    motion = torch.zeros_like(luma)
    motion[:, 1:] = luma[:, 1:] - luma[:, :-1]
    centred = video - 0.5

    def ramp(size: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = size
        values = torch.linspace(-1, 1, size, device=video.device) if size > 1 else torch.zeros(1, device=video.device)
        return values.reshape(shape).expand(batch, frames, height, width)

    ramps = torch.stack([ramp(width, 3), ramp(height, 2), ramp(frames, 1)], dim=1)
    edges = torch.stack([edge_x, edge_y, motion, laplacian], dim=1)
    features = torch.cat([edges, _blur(centred, 1), _blur(centred, 4), ramps], dim=1)
    return features * torch.tensor(FEATURE_GAINS, device=video.device).reshape(1, -1, 1, 1, 1)


def _blur(video: Tensor, reach: int) -> Tensor:
    """Box blur over (2 reach + 1)^2 pixels of each frame; the border repeats."""
    batch, channels, frames, height, width = video.shape
    flat = video.transpose(1, 2).reshape(batch * frames, channels, height, width)
    flat = F.avg_pool2d(F.pad(flat, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    return flat.reshape(batch, frames, channels, height, width).transpose(1, 2)
