"""The embedded demo model: a small, trained HunyuanVideo, its prompt encoder, and how it was made."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
MODEL_NAME = "skein_demo_hunyuan_video.safetensors"
LOADER = "SkeinDemoModel"


def accept_old_prompts() -> None:
    """Let prompts run that load the embedded model with ComfyUI's own node, which once had it in its list."""
    from server import PromptServer  # ComfyUI's; absent where the demo is used without a server

    PromptServer.instance.add_on_prompt_handler(with_demo_loader)


def with_demo_loader(request: dict) -> dict:
    """A request to POST /prompt; "Load Diffusion Model" with the embedded model becomes "Load Demo Model"."""
    nodes = request.get("prompt")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        if _is_old_loader(node):
            node.update(class_type=LOADER, inputs={})
    return request


def _is_old_loader(node: object) -> bool:
    """Whatever a client sends as a node; ComfyUI checks it later."""
    if not isinstance(node, dict) or node.get("class_type") != "UNETLoader":
        return False
    inputs = node.get("inputs")
    return isinstance(inputs, dict) and inputs.get("unet_name") == MODEL_NAME
