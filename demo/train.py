"""Train the embedded demo model: a real, small HunyuanVideo, by flow matching on synthetic scenes.

    PYTHONPATH=<ComfyUI> python -m demo.train --out demo/model --minutes 9

What ComfyUI does at sampling time is what is trained (shift 7): x = sigma noise + (1 - sigma) latent, timestep
1000 sigma, target noise - latent. Samples of a batch share one caption length, so no attention mask exists.
Sizes vary from batch to batch at a constant number of tokens. One seed makes everything.

Other models, for what is to hold on more than the embedded one: another seed, size, look of the scenes, or network.

    ... --seed 1 --look slow --network HunyuanVideo --size hidden_size=384 depth=3 depth_single_blocks=6
"""

import argparse
import csv
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import MODEL_NAME
from .lift import Lift
from .networks import NETWORKS, HunyuanVideo, TrainedNetwork
from .prompt import PromptEncoder
from .scenes import COLOURS, LOOKS, Scenes, read_video, render


@dataclass(frozen=True)
class Config:
    """Everything that decides the result."""

    seed: int = 0
    network: TrainedNetwork = field(default_factory=HunyuanVideo)
    look: str = "plain"  # of the scenes: LOOKS
    steps: int = 12000  # the schedule's length, if --minutes does not end it first
    tokens_per_batch: int = 96_000
    learning_rate: float = 1.2e-3
    warmup: int = 300
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.97)
    ema: float = 0.9995
    guidance: float = 6.0
    any_guidance: float = 0.3  # share of batches with another guidance value: it must not matter
    empty_text: float = 0.1  # share of batches without a caption, so that CFG > 1 works
    shortened_text: float = 0.15  # share of batches with words missing from the caption
    sizes: tuple[tuple[int, int, int], ...] = (  # T, H, W of the latent, and below how often each is drawn
        (9, 32, 32),
        (5, 32, 32),
        (5, 24, 24),
        (9, 24, 24),
        (9, 24, 40),
        (7, 40, 24),
        (3, 32, 32),
        (1, 32, 32),
        (13, 24, 24),
    )
    size_weights: tuple[float, ...] = (5, 2, 2, 2, 1, 1, 0.5, 0.5, 1)


class Batches:
    """Random training batches: noisy latents, timesteps, text, and the velocity to predict."""

    def __init__(self, config: Config, device: torch.device):
        import comfy.latent_formats

        latents = getattr(comfy.latent_formats, config.network.latents)
        self.config = config
        self.device = device
        self.rng = torch.Generator(device).manual_seed(config.seed)
        self.choice = torch.Generator().manual_seed(config.seed)  # sizes and captions, without a GPU sync
        self.lift = Lift(latents.latent_rgb_factors, latents.latent_rgb_factors_bias, device)
        self.encoder = PromptEncoder().to(device)

    def _chance(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self.choice) < probability)

    def caption_rows(self, scenes: Scenes) -> Tensor:
        words = scenes.words(with_size=self._chance(0.5), with_ground=self._chance(0.5)) + 1  # row 0 is "no words"
        if self._chance(self.config.empty_text):
            return torch.zeros_like(words[:, :1])
        if self._chance(self.config.shortened_text):
            keep = torch.rand(words.shape[1], generator=self.choice) < 0.7
            keep[1] = True  # at least one word stays
            return words[:, keep.nonzero().flatten().tolist()]
        return words

    def draw(self) -> dict[str, Tensor]:
        c = self.config
        weights = torch.tensor(c.size_weights, dtype=torch.float32)
        frames, height, width = c.sizes[int(torch.multinomial(weights, 1, generator=self.choice))]
        batch = max(c.tokens_per_batch // (frames * height * width // 4), 1)
        scenes = Scenes.random(batch, self.rng)
        latents = self.lift.encode(render(scenes, frames, height, width, self.rng, LOOKS[c.look]))
        context, pooled = self.encoder.embed(self.caption_rows(scenes))
        # Stratified: every batch covers the whole range of sigma.
        u = (
            torch.arange(batch, device=self.device) + torch.rand(batch, generator=self.rng, device=self.device)
        ) / batch
        shift = c.network.shift
        sigma = (shift * u / (1 + (shift - 1) * u)).reshape(-1, 1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=self.rng, device=self.device)
        guidance = torch.full((batch,), c.guidance, device=self.device)
        if self._chance(c.any_guidance):
            guidance = 1 + 9 * torch.rand(batch, generator=self.rng, device=self.device)
        return {
            "x": sigma * noise + (1 - sigma) * latents,
            "timestep": 1000 * sigma.flatten(),
            "context": context,
            **c.network.arguments(pooled, guidance),
            "target": noise - latents,
        }


def train(config: Config, minutes: float, device: torch.device) -> tuple[nn.Module, list[tuple[int, float]]]:
    """Returns the averaged (EMA) model and the loss curve as (step, mean loss of the last 100 steps)."""
    import comfy.model_management

    torch.manual_seed(config.seed)
    comfy.model_management.in_training = True  # rotary embedding with a backward
    model = config.network.build().to(device)
    average = config.network.build().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    config.network.make_trainable(model)
    parameters: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    batches, curve, running = Batches(config, device), [], torch.zeros((), device=device)
    started = time.monotonic()
    step = 0
    progress = 0.0
    while progress < 1:
        # The schedule follows whichever runs out first, steps or minutes, so that it always ends at zero.
        progress = max(step / config.steps, (time.monotonic() - started) / (60 * minutes))
        rate = (
            config.learning_rate * min(1, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batches.draw()
        target = batch.pop("target")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(**batch)
        loss = (output.float() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
        running += loss.detach()
        step += 1
        if step % 100 == 0:
            curve.append((step, float(running) / 100))
            running.zero_()
            if step in (100, 200, 300) or step % 500 == 0:
                print(
                    f"step {step} loss {curve[-1][1]:.4f} rate {rate:.2e} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
    return average, curve


@torch.no_grad()
def agreement(model: nn.Module, batches: Batches, count: int = 112, steps: int = 20) -> tuple[float, Tensor]:
    """Share of sampled videos whose colour and direction read back as asked, and some of the videos."""
    network = batches.config.network
    rng = torch.Generator(batches.device).manual_seed(12345)
    scenes = Scenes.random(count, rng)
    captions = scenes.captions(with_size=True, with_ground=False)
    context, pooled = batches.encoder.embed(scenes.words(with_size=True, with_ground=False) + 1)
    u = torch.linspace(1, 0, steps + 1)
    sigmas = (network.shift * u / (1 + (network.shift - 1) * u)).tolist()
    x = torch.randn(count, 16, 9, 32, 32, generator=rng, device=batches.device)
    guidance = torch.full((count,), 6.0, device=batches.device)
    for sigma, following in itertools.pairwise(sigmas):
        timestep = torch.full((count,), 1000 * sigma, device=batches.device)
        with torch.autocast(batches.device.type, dtype=torch.bfloat16):
            velocity = model(x, timestep, context, **network.arguments(pooled, guidance))
        x = x + (following - sigma) * velocity.float()
    videos = batches.lift.decode(x)
    right = sum(set(read_video(v)) <= set(c.split()) for v, c in zip(videos, captions))
    return right / count, videos[:8]


def save_results(out: Path, config: Config, model: nn.Module, curve, share: float, videos: Tensor) -> None:
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to(torch.bfloat16).contiguous().cpu() for key, value in model.state_dict().items()}
    save_file(tensors, str(out / MODEL_NAME), metadata={"skein_demo": json.dumps(asdict(config))})
    with open(out / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *curve])
    draw_loss(out / "loss.png", curve)
    rows = torch.cat([torch.cat(list(video), dim=1) for video in videos.cpu()], dim=0)
    Image.fromarray((rows * 255).byte().numpy()).resize((rows.shape[1] * 3, rows.shape[0] * 3), 0).save(
        out / "samples.png"
    )
    print(json.dumps({"agreement": share, "steps": curve[-1][0], "loss": curve[-1][1], "colours": len(COLOURS)}))


def draw_loss(path: Path, curve: list[tuple[int, float]]) -> None:
    """The loss curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axis.semilogy(*zip(*curve))
    axis.set_xlabel("step")
    axis.set_ylabel("flow matching loss")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the loss curve and samples")
    parser.add_argument("--minutes", type=float, default=9.0, help="training time at the most")
    parser.add_argument("--steps", type=int, default=Config.steps, help="training steps at the most")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--look", default=Config.look, choices=LOOKS, help="of the scenes")
    parser.add_argument("--network", default="HunyuanVideo", choices=NETWORKS)
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=N", help="sizes that are not the network's own")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    sizes = {name: int(value) for name, _, value in (each.partition("=") for each in arguments.size)}
    network = NETWORKS[arguments.network](**sizes)
    config = Config(arguments.seed, network, arguments.look, steps=arguments.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, curve = train(config, arguments.minutes, device)
    share, videos = agreement(model, Batches(config, device))
    save_results(arguments.out, config, model, curve, share, videos)


if __name__ == "__main__":
    main()
