"""The operator skein::attention, registered in this process."""

import importlib.util
from pathlib import Path

import torch
from skein.attention import op


def test_another_copy_of_the_pack_takes_the_operator_that_is_there():
    spec = importlib.util.spec_from_file_location("another_op", Path(op.__file__))
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.attention is op.attention
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
    for active, attention in ((op.active, another.attention), (another.active, op.attention)):
        with active(lambda q, k, v, mask: torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)):
            assert torch.equal(attention(q, q, q, None), expected.flatten(2))
