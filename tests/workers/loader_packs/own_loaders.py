"""A node pack of one file, whose loaders leave no function to load their model again: what other packs' are like."""

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from server import PromptServer

PromptServer.instance.routes.get("/own_loaders")(lambda request: None)  # as packs do when they are imported


def load(name):
    state = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("diffusion_models", name))
    return comfy.sd.load_diffusion_model_state_dict(state)


class OwnLoader:
    @classmethod
    def INPUT_TYPES(cls):
        names = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"name": (names,)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    RETURN_TYPES = ("STRING", "MODEL")
    FUNCTION = "load"

    def load(self, name, unique_id):
        return name, load(name)


class OwnLoaderV3(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("diffusion_models")
        return io.Schema(
            "OwnLoaderV3", inputs=[io.Combo.Input("name", options=names)], outputs=[io.Model.Output()]
        )  # fmt: skip

    @classmethod
    def execute(cls, name):
        return io.NodeOutput(load(name))


class OwnLoaderByPath:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, path):
        return (load(path),)


class SecondModel:
    """Another model in the place of the one that it is given, with other weights."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": (folder_paths.get_filename_list("diffusion_models"),)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"

    def change(self, model, name):
        second = load(name)
        for parameter in second.model.diffusion_model.parameters():
            parameter.mul_(1.01)
        return (second,)


NODE_CLASS_MAPPINGS = {each.__name__: each for each in (OwnLoader, OwnLoaderV3, OwnLoaderByPath, SecondModel)}
