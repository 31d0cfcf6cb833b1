"""A caller's mask counts tokens; what attention reads counts what the cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sizes import TAIL
from .evicted import first_layer, is_bounded
from .fixed import FixedLayer


def bounded_layers_agree(cache: Any, model: Any, mask: Tensor, row_budgets: Tensor | None) -> bool:
    """Whether layers that hold the last tokens alone can read the mask of rows that are cut.

    All layers of a model read one mask, and behind a cut its last columns are those of the slots
    that each row has filled. Where a sliding window reaches further back than a row keeps, or the
    row ends in pads, that is not what its tokens were.

    Args:
        mask: ``[B, K]``, 0 at pads, of all tokens seen.
        row_budgets: ``[B]`` entries that each row keeps; None where they are packed, and the mask's
            last columns are those of each row's last real tokens.
    """
    reach = [layer.sliding_window for layer in cache.layers if is_bounded(layer)]
    if not reach:
        return True
    if row_budgets is None:
        return bool(mask[:, -TAIL:].all())
    # Chunks begin at a row's first token, and transformers counts the pads before it.
    if getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None):
        return False
    columns = torch.arange(mask.shape[1], device=mask.device)[-max(reach) :]
    shown = columns >= mask.shape[1] - row_budgets[:, None]
    return torch.equal(shown, mask[:, -max(reach) :].bool())


def is_fixed(cache: Any) -> bool:
    """Whether the running call sees slots that are not in use: their mask must stay."""
    layer = first_layer(cache)
    return isinstance(layer, FixedLayer) and layer.is_fixed


def physical_mask(cache: Any, attention_mask: Tensor | None, q_len: int) -> Tensor | None:
    """The caller's 2-D mask over all tokens seen, made to fit what the cache holds.

    transformers reads the columns from ``get_mask_sizes``' offset on, one for each entry held:
    those of the kept prompt say which slots a row really filled. Without a mask all tokens are
    real, but not all slots need be.
    """
    layer = first_layer(cache)
    if layer is None:
        return attention_mask
    if layer.packed is not None:
        return _mask_behind_packed(cache, attention_mask, layer.prompt_len)
    if attention_mask is None:
        if layer.valid is None and not is_fixed(cache):
            return None
        rows, seen = layer.keys.shape[0], layer.get_seq_length() + q_len
        attention_mask = torch.ones(rows, seen, dtype=torch.int64, device=layer.device)
    if attention_mask.shape[1] < layer.prompt_len:
        return attention_mask
    rows = attention_mask.shape[0]
    length, offset = layer.get_mask_sizes(q_len)
    kept = attention_mask[:, : layer.prompt_len]
    if layer.evicted:
        kept = attention_mask.new_ones(rows, offset + layer.prompt_len - layer.evicted)
    if layer.valid is not None:
        kept = torch.cat([kept[:, :offset], layer.valid.to(kept.dtype)], dim=1)
    since = attention_mask[:, layer.prompt_len :]
    unused = offset + length - kept.shape[1] - since.shape[1]
    return torch.cat([kept, since, since.new_zeros(rows, max(unused, 0))], dim=1)


def _mask_behind_packed(
    cache: Any, attention_mask: Tensor | None, prompt_len: int
) -> Tensor | None:
    """All that is packed is real, and so is the tail: what the prompt's columns say is not read.

    But layers that hold the last tokens read them, see ``bounded_layers_agree``.
    """
    if attention_mask is None or any(is_bounded(layer) for layer in cache.layers):
        return attention_mask
    since = attention_mask[:, prompt_len:]
    return torch.cat([torch.ones_like(attention_mask[:, :prompt_len]), since], dim=1)
