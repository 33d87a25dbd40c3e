"""random_tokens: prompts of a length, from a seed."""

from __future__ import annotations

import torch


def random_tokens(length: int, seed: int = 0, vocab_size: int = 331, first: int = 3) -> list[int]:
    """Token ids ``first`` .. ``vocab_size - 1``: by default none of the special ones."""
    return torch.randint(first, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
