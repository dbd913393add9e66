"""The embedded demo model: a small, trained HunyuanVideo, its prompt encoder, and how it was made."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
MODEL_NAME = "skein_demo_hunyuan_video.safetensors"


def register_model_folder() -> None:
    """Let ComfyUI's own "Load Diffusion Model" node list the embedded checkpoint."""
    import folder_paths  # ComfyUI's; absent where the demo is used without a server

    folder_paths.add_model_folder_path("diffusion_models", str(MODEL_FOLDER))
