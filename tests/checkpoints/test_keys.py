"""What a key map can say, on weights small enough to be read."""

import pytest
import torch
from diffusers_forms import backwards
from skein.checkpoints.keys import Changed, KeyMap, make, part, plan, shaped, swap_halves, under
from skein.checkpoints.maps import MAPS

KNOWN = KeyMap(
    classes=("Toy",),
    weights={
        "embed": "patch.proj",
        **under(
            "blocks.*", "layers.*", {"qkv": ("q", "k"), "experts.*.w": "moe.*.up", "gate": Changed("ff", part(1, 2))}
        ),
        "last": Changed("norm_out", swap_halves),
        "table": Changed("scale_shift", shaped(2, -1)),
    },
    unused=("rope.freqs",),
)
WEIGHTS = {
    "patch.proj.weight": torch.arange(4.0).reshape(2, 2),
    "patch.proj.bias": torch.tensor([4.0, 5.0]),
    "layers.11.q.weight": torch.tensor([[6.0, 7.0]]),
    "layers.11.k.weight": torch.tensor([[8.0, 9.0]]),
    "layers.11.moe.3.up.weight": torch.tensor([[10.0]]),
    "layers.11.ff.weight": torch.tensor([[11.0], [12.0]]),
    "norm_out.bias": torch.tensor([13.0, 14.0]),
    "scale_shift": torch.tensor([15.0, 16.0]),
    "rope.freqs": torch.tensor([17.0]),
}


def made(weights):
    planned, strange = plan(KNOWN, weights)
    assert not strange
    return {name: make(each, weights) for name, each in planned.items()}


def test_every_kind_of_rule():
    assert {name: weight.tolist() for name, weight in made(WEIGHTS).items()} == {
        "embed.weight": [[0, 1], [2, 3]],
        "embed.bias": [4, 5],
        "blocks.11.qkv.weight": [[6, 7], [8, 9]],
        "blocks.11.experts.3.w.weight": [[10]],
        "blocks.11.gate.weight": [[12]],
        "last.bias": [14, 13],
        "table": [[15], [16]],
    }


def test_what_is_only_renamed_is_the_very_tensor():
    assert made(WEIGHTS)["embed.weight"] is WEIGHTS["patch.proj.weight"]


def test_keys_that_the_map_does_not_know_are_named():
    assert plan(KNOWN, [*WEIGHTS, "patch.proj.scale", "layers.x.q.weight"])[1] == [
        "patch.proj.scale",
        "layers.x.q.weight",
    ]


def test_a_part_of_a_weight_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"layers\.11\.q\.weight is there, .* blocks\.11\.qkv\.weight"):
        plan(KNOWN, [key for key in WEIGHTS if ".k." not in key])


def test_a_weight_is_not_cut_into_unequal_parts():
    with pytest.raises(RuntimeError):
        part(0, 2)(torch.zeros(3, 1))


def test_a_map_runs_backwards():
    whole = {key: weight for key, weight in WEIGHTS.items() if key not in ("rope.freqs", "layers.11.ff.weight")}
    back = backwards(KNOWN, made(whole), {key: weight.shape for key, weight in whole.items()})
    assert all(torch.equal(back[key], weight) for key, weight in whole.items())


def test_no_class_has_two_maps():
    classes = [name for known in MAPS for name in known.classes]
    assert len(classes) == len(set(classes))


@pytest.mark.parametrize("known", MAPS, ids=lambda known: known.classes[0])
def test_both_sides_of_a_rule_have_the_same_numbers(known):
    for path, source in known.weights.items():
        of = source.of if isinstance(source, Changed) else source
        for each in (of,) if isinstance(of, str) else of:
            assert each.count("*") == path.count("*"), path
