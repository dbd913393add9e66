"""Models as people have them: in diffusers' format."""
