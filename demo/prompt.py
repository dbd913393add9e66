"""The demo model's prompt encoder: one token a word, looked up in a table. No network, no randomness.

A word has a 64-dimensional token (the model's text stream) and a 768-dimensional vector whose mean over the
prompt is what HunyuanVideo takes from CLIP. The table is fixed noise, made once from a seed (`write_table`):
the model learned what the words mean, not the other way round.

Letters: L words, C = 64 token features, P = 768 pooled features.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TABLE = Path(__file__).parent / "words.safetensors"
EMPTY = "<empty>"  # stands for a prompt without words, as negative prompts often are
PADDED_LENGTH = 256
TOKEN_DIM, POOLED_DIM = 64, 768


class PromptEncoder:
    """Turns prompts into HunyuanVideo conditioning: text tokens and a pooled vector."""

    def __init__(self, table: Path = TABLE):
        with safe_open(str(table), framework="pt") as file:
            self.words: list[str] = json.loads(file.metadata()["words"])
            self.tokens: Tensor = file.get_tensor("tokens").float()
            self.pooled: Tensor = file.get_tensor("pooled").float()
        self._index = {word: i for i, word in enumerate(self.words)}

    def indices(self, prompt: str) -> list[int]:
        """Table rows of a prompt's words; ValueError names the words that the table does not have."""
        words = re.findall(r"[^\s,.;:!?]+", prompt.lower()) or [EMPTY]
        unknown = sorted({word for word in words if word not in self._index})
        if unknown:
            known = " ".join(word for word in self.words if word != EMPTY)
            raise ValueError(f"The demo model does not know {', '.join(map(repr, unknown))}. Use only: {known}.")
        if len(words) > PADDED_LENGTH:
            raise ValueError(f"The prompt has {len(words)} words; use at most {PADDED_LENGTH}.")
        return [self._index[word] for word in words]

    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Tokens (1, L, C) and pooled vector (1, P) of a prompt, float32."""
        return self.embed(torch.tensor([self.indices(prompt)]))

    def embed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) and pooled vectors (B, P) of table rows (B, L)."""
        return self.tokens[indices], self.pooled[indices].sum(dim=1) / math.sqrt(indices.shape[1])

    def to(self, device: torch.device | str) -> "PromptEncoder":
        self.tokens, self.pooled = self.tokens.to(device), self.pooled.to(device)
        return self


def pad(tokens: Tensor, length: int = PADDED_LENGTH) -> tuple[Tensor, Tensor]:
    """Zero-pad tokens (1, L, C) to (1, length, C), with the attention mask (1, length): 1 for words."""
    padded = tokens.new_zeros(tokens.shape[0], length, tokens.shape[2])
    padded[:, : tokens.shape[1]] = tokens
    mask = torch.zeros(tokens.shape[0], length, dtype=torch.int64)
    mask[:, : tokens.shape[1]] = 1
    return padded, mask


def write_table(words: list[str], path: Path = TABLE, seed: int = 0) -> None:
    """Make the table of `words` from a seed: unit-variance noise, stored in float16."""
    rng = torch.Generator().manual_seed(seed)
    words = [EMPTY, *words]
    tensors = {
        "tokens": torch.randn(len(words), TOKEN_DIM, generator=rng).half(),
        "pooled": torch.randn(len(words), POOLED_DIM, generator=rng).half(),
    }
    save_file(tensors, str(path), metadata={"words": json.dumps(words)})
