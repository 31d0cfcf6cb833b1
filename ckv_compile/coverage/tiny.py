"""Tiny random models of every architecture: configurations shrunk by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

CAUSAL, SEQ2SEQ = "causal", "seq2seq"
VOCAB = 160

# What a size becomes, whichever of these names a configuration gives it.
_SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim "
    "input_embedding_size output_embedding_size lru_width attention_hidden_size hidden_dim "
    "encoder_hidden_size embedding_dim out_hidden_size vision_output_dim embed_dim "
    "projector_input_dim projector_output_dim pronunciation_embed_dim shape_embed_dim "
    "lang_embed_dim spkr_embed_dim unit_embed_dim audio_embed_dim output_dim input_size "
    "hidden_size_global expert_capacity",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
    "num_decoder_layers num_encoder_layers speech_encoder_layers t2u_encoder_layers "
    "t2u_decoder_layers num_blocks conf_num_hidden_layers num_key_value_heads num_kv_heads "
    "kv_n_heads num_query_groups num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts "
    "num_experts_per_token zero_expert_num index_n_heads linear_num_key_heads num_quantizers "
    "num_codebooks n_mamba_heads mamba_expand adapter_reduction_factor sliding_window_pattern "
    "_sliding_window_pattern global_attn_every_n_layers",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
    "num_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads "
    "conf_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "linear_num_value_heads global_block_size num_global_tokens",
    16: "head_dim d_kv kv_channels dim_head attention_head_size d_head attention_head_dim "
    "swa_head_dim qk_nope_head_dim hidden_size_per_layer_input laurel_rank adapter_rank "
    "index_head_dim patch_size num_mel_bins mamba_d_head mamba_headdim query_pre_attn_scalar",
    96: "intermediate_size ffn_dim d_ff dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "intermediate_size_mlp mlp_dim d_inner feed_forward_size shared_intermediate_size "
    "speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "image_size crop_size max_pos_emb",
    VOCAB: "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input "
    "n_words _vocab_size pronunciation_vocab_size shape_vocab_size char_vocab_size t2u_vocab_size "
    "audio_vocab_size codebook_size unit_hifi_gan_vocab_size encoder_hash_byte_group_vocab",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions "
    "max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings "
    "t2u_max_position_embeddings max_sequence_length seq_length original_max_position_embeddings "
    "context_length",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group "
    "first_k_dense_replace num_dense_layers moe_layer_start_index mamba_n_groups n_groups "
    "mamba_ngroups max_window_layers decoder_sparse_step encoder_sparse_step "
    "num_sparse_encoder_layers num_sparse_decoder_layers num_random_blocks moe_layer_end_index "
    "num_mem_blocks",
    8: "qk_rope_head_dim mamba_d_state state_size mamba_n_heads mamba_chunk_size chunk_size "
    "linear_key_head_dim linear_value_head_dim rotary_dim mamba_dt_rank time_step_rank "
    "prompt_length prompt_mid_dim window_size attention_window_size attention_chunk_size "
    "attention_window lsh_attn_chunk_length local_attn_chunk_length context_size local_attention "
    "sliding_window",
    12: "v_head_dim",
    24: "qk_head_dim",
    6: "index_topk",
    3: "local_radius",
    128: "mamba_d_ssm",
    0: "mem_len",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_DROPPED = {
    "transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path", "id2label",
    "label2id", "num_labels", "is_encoder_decoder", "attn_implementation", "per_layer_config",
    "activation_sparsity_pattern",
}  # fmt: skip
_DROP = object()
_LLAMA4 = {
    "layer_types": ["chunked_attention", "full_attention"],
    "interleave_moe_layer_step": 2,
}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}

# What the names do not say: two layers of the kinds that the architecture has, sizes that must fit.
_SPECIAL: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "layers_block_type": _DROP},
    "bamba": {"attn_layer_indices": [1], "layers_block_type": _DROP, "mamba_n_heads": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": _DROP},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False, "attention_head_dim": 32, "attention_hidden_size": 128,
              "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "layer_types": _DROP},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
               "use_mamba_kernels": False, "attention_head_dim": 32, "attention_hidden_size": 128,
               "n_mamba_heads": 8, "num_key_value_heads": 4, "use_mem_rope": True,
               "hybrid_layer_ids": [1], "layer_types": _DROP},
    "recurrent_gemma": {"num_hidden_layers": 3,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "mamba2": {"expand": 2, "num_heads": 8, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]],
                "attention_layers": ["global", "local"]},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4,
                            "moe_top_k": 2}},
    "mllama": {"cross_attention_layers": [1]},
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention"]},
    "cpmant": {"prompt_length": 4, "prompt_types": 8, "segment_types": 8},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "chunk_size": 16},
    "longcat_flash": {"num_layers": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "phi3": {"rope_scaling": None},
    "phi4_multimodal": {"rope_scaling": None},
    "qwen2": _NO_WINDOW, "qwen2_moe": _NO_WINDOW, "mistral": {"sliding_window": None},
    "fsmt": {"langs": ["en", "de"]},
    "llama4": _LLAMA4, "llama4_text": _LLAMA4,
    "doge": {"keep_window_size": 64},
    "ernie4_5_moe": {"moe_layer_end_index": 1, "moe_layer_interval": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": _DROP},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": _DROP},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "intermediate_size": 96},
    "dots1": {"head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
              "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {"head_dim": 16, "num_key_value_heads": 2},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "moshi": {"codebook_size": 256, "audio_vocab_size": 256},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


_CLASSES = {
    CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def architectures() -> list[tuple[str, str]]:
    """``(kind, model type)`` of every causal and seq2seq architecture of the installed version."""
    return [(kind, name) for kind, names in _CLASSES.items() for name in names]


def build(kind: str, model_type: str) -> nn.Module:
    """A random model of two layers or so, in eval mode, the same at every call."""
    name = _CLASSES[kind][model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = _config(model_class, kind, model_type)
    torch.manual_seed(0)
    try:
        model = model_class._from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product" not in str(error) and "sdpa" not in str(error).lower():
            raise
        config = _config(model_class, kind, model_type)
        model = model_class._from_config(config, attn_implementation="eager")
    # Random attention is nearly flat; sharper logits make tests tell selections apart.
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(part in path for part in ("q_proj", "k_proj", "query")):
                parameter.mul_(4.0)
    return model.eval()


def _config(model_class: Any, kind: str, model_type: str) -> Any:
    config_class = model_class.config_class or transformers.CONFIG_MAPPING[model_type]
    if model_type == "encoder-decoder":
        encoder, decoder = (_config(transformers.BertLMHeadModel, CAUSAL, "bert") for _ in range(2))
        encoder.is_decoder, decoder.add_cross_attention = False, True
        config = config_class.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return config
    given = config_class().to_dict()
    small = _shrunk(given) | _SPECIAL.get(model_type, {})
    small = {n: value for n, value in small.items() if value is not _DROP and n != "model_type"}
    if isinstance(small.get("text_config"), dict):
        small["text_config"] |= _SPECIAL.get(f"{model_type}_text", {})
    if kind == CAUSAL:
        small["is_decoder"] = True
    small["use_cache"] = True
    if small.get("pad_token_id") is None:
        small["pad_token_id"] = 1
    return config_class(**small)


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """The same fields, small."""
    small: dict[str, Any] = {}
    for name, value in given.items():
        if name in _DROPPED:
            continue
        if isinstance(value, dict) and (name.endswith("config") or name in ("encoder", "decoder")):
            small[name] = _shrunk(value)
        elif name in _SMALL and isinstance(value, (int, float)) and not isinstance(value, bool):
            small[name] = _SMALL[name]
        else:
            small[name] = _token(name, value)
    kinds = list(dict.fromkeys(given.get("layer_types") or ()))
    if kinds:
        small["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        if "num_hidden_layers" in given:
            small["num_hidden_layers"] = len(small["layer_types"])
    if given.get("mlp_layer_types"):
        small["mlp_layer_types"] = list(given["mlp_layer_types"][:1]) * small["num_hidden_layers"]
    if given.get("qk_rope_head_dim") and given.get("kv_lora_rank"):
        # Latent attention: the rotary part has the size that is called head_dim, all heads K and V.
        small |= {"head_dim": 8, "num_key_value_heads": 4}
    for name, value in (("no_rope_layers", [1, 0]), ("moe_layers", [1]), ("mlp_only_layers", [])):
        if given.get(name):
            small[name] = value
    return small


def _token(name: str, value: Any) -> Any:
    """Token ids within the small vocabulary, and apart from those of a prompt."""
    if isinstance(value, list) and name.endswith("token_id"):
        return [_token(name, one) for one in value]
    counts = isinstance(value, int) and not isinstance(value, bool)
    if counts and name.endswith(("token_id", "token_index", "_index")) and not 0 <= value < 8:
        return abs(value) % 7 + 90
    return value
