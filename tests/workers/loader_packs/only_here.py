"""A node pack that can be imported in ComfyUI's own process only."""

import comfy.sd
import folder_paths

import __main__

if not hasattr(__main__, "start_comfyui"):
    raise ImportError("its library is not for worker processes")


class OnlyHere:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (folder_paths.get_filename_list("diffusion_models"),)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    def load(self, name):
        model = comfy.sd.load_diffusion_model(folder_paths.get_full_path_or_raise("diffusion_models", name))
        model.cached_patcher_init = None
        return (model,)


NODE_CLASS_MAPPINGS = {"OnlyHere": OnlyHere}
