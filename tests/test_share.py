"""A second model over the same tensors: all that is the model's own, nothing that others keep on the loaded one."""

import comfy.model_management
import pytest
import torch
from skein.models import share
from small_models import HUNYUAN_VIDEO_15, random_clip, random_hunyuan_video
from vaes import FAMILIES, build

MODELS = {
    "HunyuanVideo": lambda: random_hunyuan_video().model,
    "HunyuanVideo 1.5": lambda: random_hunyuan_video(**HUNYUAN_VIDEO_15).model,
    "CLIP-L": lambda: random_clip().cond_stage_model,
    **{f"VAE of {name}": lambda name=name: build(name) for name in FAMILIES},
}
# What ComfyUI's newest sources put on modules, and what the next might.
PRIVATE = (
    "_v_block", "_v_block_faulted", "_comfy_graph", "_comfy_malloc_graph", "_comfy_cross_step_state",
    "_v_signature", "_prefetch", "_pin_state", "_pinned_pages_of_next_month",
)  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_the_copy_has_what_the_model_was_built_with_and_nothing_that_was_put_on_it_later(name):
    model = MODELS[name]()
    built = [dict(vars(module)) for module in model.modules()]
    for module in model.modules():
        vars(module).update(dict.fromkeys(PRIVATE, torch.zeros(1)))
    copies = list(share(model).modules())
    for attributes, module, copy in zip(built, model.modules(), copies, strict=True):
        assert type(module) is type(copy) and not set(PRIVATE) & set(vars(copy))
        private = {attribute for attribute in attributes if attribute.startswith("_")}
        plain = {each for each in private if isinstance(attributes[each], (int, tuple))}
        assert private <= set(vars(copy)) and all(vars(copy)[each] == attributes[each] for each in plain)


def test_code_that_a_class_reads_by_name_stays():
    """An attribute that a module is given from outside and reads itself, and one that it asks for by getattr."""

    class Block(torch.nn.Module):
        def forward(self, x):
            return x * self._factor * getattr(self, "_bias_scale", 1)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.block._place = 2

        def forward(self, x):
            return self.block(x) + self.block._place

    network = Network()
    network.block._factor, network.block._bias_scale, network.block._state_of_others = 3, 5, torch.zeros(1)
    copy = share(network)
    assert copy(torch.ones(1)) == network(torch.ones(1)) == 17 and not hasattr(copy.block, "_state_of_others")


def test_a_model_that_has_been_loaded_leaves_comfyuis_books_behind():
    model = random_hunyuan_video()
    built = set(vars(model.model.diffusion_model.img_in.proj))
    comfy.model_management.load_models_gpu([model])
    model.detach()
    assert set(vars(share(model.model).diffusion_model.img_in.proj)) <= built
