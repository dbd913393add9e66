"""What is known of text encoders."""

# Names of Linear layers that stay as they are: heads, small or shared with embeddings, and read other than by a call.
TEXT_ENCODER_KEEPS = ("lm_head", "text_projection")
