"""Cutting padded text, on a toy model call whose output says which tokens it saw."""

import pytest
import torch
from skein.attention.text import kept_ranges, without_padding


def seen(arguments: dict) -> torch.Tensor:
    """(B, 2): the sum of the text that came in, and its length; checks that no mask came along."""
    assert arguments["attention_mask"] is None
    context = arguments["context"]
    total = context.sum(dim=(1, 2)) + arguments["x"][:, 0]
    return torch.stack([total, torch.full_like(total, context.shape[1])], dim=1)


def call(mask, batch=2, tokens=6, **options) -> dict:
    context = torch.arange(1.0, batch * tokens + 1).reshape(batch, tokens, 1)
    return {
        "x": torch.zeros(batch, 1), "context": context, "attention_mask": torch.as_tensor(mask),
        "control": None, "transformer_options": {"sigmas": torch.ones(batch), **options},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "ranges"),
    [
        ([[1, 1, 1, 0]], [(0, 3)]),
        ([[0, 1, 1, 1]], [(1, 4)]),
        ([[False, True, False]], [(1, 2)]),
        ([[1, 1], [1, 0]], [(0, 2), (0, 1)]),
        ([[0.0, 0.0, -3.4e38]], [(0, 2)]),
        ([[0.0, float("-inf")]], [(0, 1)]),
        ([[1, 0, 1]], None),  # a hole
        ([[0, 0, 0]], None),  # nothing left
        ([[0.0, -1.5, 0.0]], None),  # a weight
        ([[1.0, 1.0]], None),  # an additive one shifts scores
    ],
)
def test_what_a_mask_keeps(mask, ranges):
    assert kept_ranges(torch.tensor(mask)) == ranges


def test_equal_lengths_are_cut_in_one_call():
    output = without_padding(seen, call([[1, 1, 1, 0, 0, 0]] * 2))
    assert output.tolist() == [[1 + 2 + 3, 3], [7 + 8 + 9, 3]]
    assert without_padding(seen, call([[1, 1, 1, 0, 0, 0]])).tolist() == output.tolist()  # one row for all


def test_different_lengths_keep_their_place_in_the_batch():
    mask = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    output = without_padding(seen, call(mask, batch=3))
    assert output.tolist() == [[1 + 2, 2], [10 + 11 + 12, 3], [13 + 14, 2]]


def test_groups_are_labelled_by_what_they_hold():
    labels = []

    def run(arguments):
        labels.append((arguments["transformer_options"]["cond_or_uncond"], arguments["transformer_options"]["uuids"]))
        return seen(arguments)

    one, two = [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]
    chunks = dict(cond_or_uncond=[0, 1], uuids=["a", "b"])
    without_padding(run, call([one, one, two, two], batch=4, **chunks))
    assert labels == [([0], ["a"]), ([1], ["b"])]
    labels.clear()
    without_padding(run, call([one, two, one, two], batch=4, **chunks))  # samples of one chunk differ
    assert labels == [([0, 1], [("a", 0), ("b", 0)]), ([0, 1], [("a", 1), ("b", 1)])]


def test_every_batched_argument_is_split_and_the_rest_is_not():
    calls = []

    def run(arguments):
        calls.append(arguments)
        return seen(arguments)

    arguments = call([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    arguments |= {"control": {"input": [torch.tensor([[5.0], [6.0]]), None]}, "rope": torch.ones(3), "flag": True}
    without_padding(run, arguments)
    assert [c["control"]["input"][0].tolist() for c in calls] == [[[5.0]], [[6.0]]]
    assert all(c["control"]["input"][1] is None and c["rope"].shape == (3,) and c["flag"] is True for c in calls)
    assert arguments["attention_mask"] is not None and arguments["context"].shape[1] == 6  # nothing changed in place


def test_a_mask_that_is_no_padding_stays_and_one_that_does_not_fit_is_refused():
    arguments = call([[1, 0, 1, 1, 1, 1]] * 2)
    assert without_padding(lambda a: a["attention_mask"], arguments) is arguments["attention_mask"]
    with pytest.raises(ValueError, match="one text encoder node"):
        without_padding(seen, call([[1, 1]]))
    no_mask = {**call([[1]]), "attention_mask": None}
    assert without_padding(seen, no_mask)[:, 1].tolist() == [6, 6]
