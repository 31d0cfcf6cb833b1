"""Tiny random models of the families that the matcher is pinned to: (sites, rejections) of two
layers, by reason."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 96}
OPT = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 64}
FALCON = {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}
GEMMA2 = {**SMALL, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}

# family: (options, KV heads, matched sites, {reason: count})
FAMILIES: dict[str, tuple[dict, int, int, dict[str, int]]] = {
    "llama": (SMALL, 2, 2, {}),
    "mistral": ({**SMALL, "sliding_window": None}, 2, 2, {}),
    "qwen2": (SMALL, 2, 2, {}),
    "qwen3": ({**SMALL, "head_dim": 16}, 2, 2, {}),
    "phi3": (SMALL, 2, 2, {}),
    # Every second layer of Gemma 2 has a sliding-window cache, which is bounded already.
    "gemma2": (GEMMA2, 2, 1, {"SLIDING_WINDOW": 1}),
    "olmo2": (SMALL, 2, 2, {}),
    "granite": (SMALL, 2, 2, {}),
    "cohere": (SMALL, 2, 2, {}),
    "gpt_neox": (SMALL, 4, 2, {}),
    "phi": (SMALL, 2, 2, {}),
    "stablelm": (SMALL, 2, 2, {}),
    "starcoder2": (SMALL, 2, 2, {}),
    "gpt2": (GPT2, 4, 2, {}),
    "opt": (OPT, 4, 2, {}),
    "falcon": (FALCON, 4, 2, {}),
}


def tiny(family: str = "llama", **options: object) -> PreTrainedModel:
    """A random model of the family, in eval mode, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family][0], **options})
    # Random attention is nearly flat; sharper logits make tests tell selections apart.
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key", "c_attn")):
                parameter.mul_(4.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, n]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch, n), generator=generator)


def generated(model: PreTrainedModel, ids: torch.Tensor, steps: int = 6, **options: object):
    """Greedy generation, unless the options say otherwise, with everything it can return."""
    options = {"max_new_tokens": steps, "do_sample": False, **options}
    return model.generate(ids, return_dict_in_generate=True, **options)
