"""A worker process: how it starts, and what it does when ComfyUI's process asks. Only worker processes import it."""
