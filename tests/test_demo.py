"""The demo's parts: prompts, scenes, the lift, and what the embedded model makes of a prompt."""

import pytest
import torch
from comfy.latent_formats import HunyuanVideo as Latents
from skein.demo.lift import Lift
from skein.demo.prompt import PromptEncoder, pad
from skein.demo.sampling import PROMPTS, sample
from skein.demo.scenes import Scenes, read_video, render
from skein.preview import latent_to_frames


def test_prompts_are_one_token_a_word():
    encoder = PromptEncoder()
    tokens, pooled = encoder.encode("A red circle, moves left.")
    assert tokens.shape == (1, 5, 64) and pooled.shape == (1, 768)
    assert torch.equal(tokens, encoder.encode("a red circle moves left")[0])
    assert encoder.encode("")[0].shape == (1, 1, 64)


def test_padded_prompts_have_a_mask_over_their_words():
    tokens, _ = PromptEncoder().encode("a red circle")
    padded, mask = pad(tokens)
    assert padded.shape == (1, 256, 64) and mask.sum() == 3
    assert torch.equal(padded[:, :3], tokens) and not padded[:, 3:].any()


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match=r"does not know 'dragon', 'two'.*Use only: a moves"):
        PromptEncoder().encode("two red dragon")
    with pytest.raises(ValueError, match="at most 256"):
        PromptEncoder().encode("red " * 257)


def test_scenes_read_back_as_their_captions_and_a_wrong_caption_does_not():
    rng = torch.Generator().manual_seed(3)
    scenes = Scenes.random(40, rng)
    videos = render(scenes, 9, 32, 32, rng).permute(0, 2, 3, 4, 1)
    captions = [set(caption.split()) for caption in scenes.captions(with_size=True, with_ground=True)]
    readings = [set(read_video(video)) for video in videos]
    assert all(reading <= caption for reading, caption in zip(readings, captions))
    assert sum(reading <= caption for reading, caption in zip(readings, captions[1:])) < 20


def test_the_preview_of_a_lifted_video_is_the_video():
    rng = torch.Generator().manual_seed(4)
    video = render(Scenes.random(2, rng), 5, 24, 32, rng)
    lift = Lift(Latents.latent_rgb_factors, Latents.latent_rgb_factors_bias)
    latents = lift.encode(video)
    assert (lift.decode(latents) - video.permute(0, 2, 3, 4, 1)).abs().max() < 1e-5
    # The node's preview starts from the saved latent, which ComfyUI has scaled.
    shown = latent_to_frames(Latents().process_out(latents), Latents(), scale=2)
    assert shown.shape == (10, 48, 64, 3)
    assert (shown[:5, ::2, ::2] - video[0].permute(1, 2, 3, 0)).abs().max() < 1e-5
    assert latents.std(dim=(0, 2, 3, 4)).min() > 0.1  # no channel is empty


def test_previews_refuse_latents_of_another_model():
    with pytest.raises(ValueError, match="16 channels"):
        latent_to_frames(torch.zeros(1, 4, 8, 8), Latents())


def test_the_model_follows_colour_and_direction(demo_model):
    """10 prompts x 2 seeds, 20 steps: at least 90 % read back as asked."""
    right = 0
    for index, prompt in enumerate(PROMPTS[:10]):
        for seed in (1, 2):
            latent = sample(demo_model, prompt, seed=10 * index + seed)
            right += set(read_video(latent_to_frames(latent, Latents()))) <= set(prompt.split())
    assert right >= 18, f"{right} of 20 videos show the colour and direction that the prompt asks for"
