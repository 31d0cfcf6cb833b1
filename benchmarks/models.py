"""Random models in the shapes of real ones."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def smollm2(num_hidden_layers: int = 30) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random weights, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    """Token ids ``[batch, length]``."""
    return torch.randint(0, 49152, (batch, length), generator=torch.Generator().manual_seed(1))
