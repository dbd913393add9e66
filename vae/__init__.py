"""Decoding latents on one device or several, through ComfyUI's own VAE."""
