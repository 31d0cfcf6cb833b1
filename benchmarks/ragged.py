"""Decode over heads of different lengths: packed, against SDPA over a padded or a uniform cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import parser, report, timed, watched
from torch import Tensor

from ckv_compile.kernels.ragged_attention import ragged_attention

# Llama-3.1-8B: H, Hkv, D
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Of the logarithm of a head's length: 0.38 is what Ada-KV gives SmolLM2-135M's heads at a budget of
# 0.2 on 4,096 tokens of pydoc's text on argparse; models with more heads may have more.
SPREADS = (0.38, 0.8)


def lengths_of(total: int, spread: float) -> Tensor:
    """Entries of each head, ``[KV_HEADS]``, log-normal, ``total`` in all."""
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf((torch.arange(KV_HEADS) + 0.5) / KV_HEADS)
    shares = (spread * quantiles).exp()
    lengths = (shares / shares.sum() * total).long()
    lengths[0] += total - lengths.sum()
    return lengths


def measure(total: int, spread: float, repeats: int) -> dict[str, object]:
    """One row: correct first, then the time of one query, float32, a batch of one."""
    lengths = lengths_of(total, spread)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    key, value = torch.randn(total, HEAD_DIM), torch.randn(total, HEAD_DIM)
    query = torch.randn(1, HEADS, 1, HEAD_DIM)
    tail_key, tail_value = torch.randn(2, 1, KV_HEADS, 2, HEAD_DIM)
    longest = int(lengths.max()) + 2
    padded_key, padded_value = torch.zeros(2, 1, KV_HEADS, longest, HEAD_DIM)
    mask = torch.zeros(1, KV_HEADS, 1, longest, dtype=torch.bool)
    for h, length in enumerate(lengths.tolist()):
        for padded, packed, tail in (
            (padded_key, key, tail_key),
            (padded_value, value, tail_value),
        ):
            padded[0, h, :length] = packed[starts[h] : starts[h + 1]]
            padded[0, h, length : length + 2] = tail[0, h]
        mask[0, h, :, : length + 2] = True
    uniform_key, uniform_value = torch.randn(2, 1, KV_HEADS, total // KV_HEADS + 2, HEAD_DIM)
    groups = HEADS // KV_HEADS
    folded = query.view(1, KV_HEADS, groups, HEAD_DIM)
    each_head = mask.repeat_interleave(groups, 1)
    cu = starts.int()
    # As in a model: Inductor fuses what is done with the tail.
    compiled = torch.compile(ragged_attention)
    candidates = {
        "packed": lambda: compiled(query, key, value, cu, tail_key, tail_value),
        "uniform": lambda: F.scaled_dot_product_attention(folded, uniform_key, uniform_value),
        "padded": lambda: F.scaled_dot_product_attention(
            query, padded_key, padded_value, attn_mask=each_head, enable_gqa=True
        ),
        "padded, folded": lambda: F.scaled_dot_product_attention(
            folded, padded_key, padded_value, attn_mask=mask
        ),
    }
    torch.testing.assert_close(candidates["packed"](), candidates["padded"]())
    seconds = timed(candidates, repeats)
    return {
        "entries per head": total // KV_HEADS,
        "spread": spread,
        "longest / mean": longest * KV_HEADS / total,
        **{f"{name} ms": 1e3 * of for name, of in seconds.items()},
        "packed / uniform": seconds["packed"] / seconds["uniform"],
        "padded / packed": seconds["padded"] / seconds["packed"],
        "padded, folded / packed": seconds["padded, folded"] / seconds["packed"],
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    # A tenth and all of a prompt of 8k and of 32k tokens.
    entries = (819,) if options.quick else (819, 3277, 8192, 32768)
    sizes = [(n * KV_HEADS, spread) for n in entries for spread in SPREADS]
    rows = [measure(*size, max(options.repeats, 30)) for size in watched(sizes, "ragged attention")]
    report("ragged", "One query over one layer's cache, Llama-3.1-8B's heads", rows, options)


if __name__ == "__main__":
    main()
