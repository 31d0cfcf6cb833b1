"""What eviction costs at least on one GPU, from its data sheet: an estimate, nothing is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu.nodes import LLAMA, Shape

# NVIDIA's data sheet of the H100 SXM, dense numbers without sparsity.
BYTES_PER_SECOND = 3.35e12
BFLOAT16_PER_SECOND = 989e12
FLOAT32_PER_SECOND = 67e12
MULTIPROCESSORS = 132

WINDOW, RATIO, KEYS_OF_A_TILE = 32, 0.1, 128
LENGTHS = (8 << 10, 32 << 10, 128 << 10)
# Passes of the selection over its row: five of stage 1 over the scores, five of stage 2 and the one
# that writes over scores and norms.
SELECT_READS = 5 + 2 * 6


@dataclass(frozen=True)
class Cost:
    """What a kernel moves and computes at least.

    Attributes:
        bytes: to and from memory, each operand once.
        flops: two for a multiplication and an addition.
        share: of the GPU's multiprocessors that have work.
        peak: flops in a second.
    """

    bytes: float
    flops: float = 0
    share: float = 1
    peak: float = BFLOAT16_PER_SECOND

    @property
    def seconds(self) -> float:
        """The roofline: memory or arithmetic, whichever takes longer."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / self.peak) / self.share


def eviction(kv_len: int, shape: Shape = LLAMA) -> dict[str, Cost]:
    """Of one layer, bfloat16, a batch of one."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    cache, scores = 2 * kv_heads * kv_len * head_dim, 4 * kv_heads * kv_len
    stats = 2 * 4 * heads * WINDOW * kv_len / KEYS_OF_A_TILE
    queries, logits = 2 * heads * WINDOW * head_dim, 2 * heads * WINDOW * kv_len * head_dim
    weight, mean = 2 * shape.hidden_size * heads * head_dim, 4 * heads * kv_len
    norm, gram = 2 * heads * kv_len * head_dim, 4 * heads * head_dim**2
    select = Cost(SELECT_READS * scores, share=min(kv_heads / MULTIPROCESSORS, 1))
    return {
        "softmax_stats_kernel": Cost(cache + queries + stats, logits),
        "mean_attention_kernel": Cost(cache + queries + mean, logits),
        "reductions and pooling, Inductor's": Cost(stats + 3 * mean + scores),
        "projected_norm_kernel": Cost(cache + weight + scores, norm * shape.hidden_size),
        "select_kernel": select,
        "compact_kernel": Cost(4 * RATIO * cache),
        '(projected_norm_kernel, `norm="l2"`)': Cost(
            cache + gram + scores, norm * head_dim, peak=FLOAT32_PER_SECOND
        ),
    }


def prefill(kv_len: int, shape: Shape = LLAMA) -> dict[str, Cost]:
    """The layer's own attention, causal, and its four projections; no feed-forward network."""
    features, kv_features = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = 2 * shape.hidden_size * (features + kv_features)
    activations = kv_len * (2 * shape.hidden_size + 2 * features + 2 * kv_features)
    moved = 2 * kv_len * 2 * (features + kv_features)
    return {
        "attention": Cost(moved, 2 * features * kv_len**2),
        "projections": Cost(2 * (weights + activations), 2 * kv_len * weights),
    }


def _rows(costs: list[dict[str, Cost]]) -> Iterator[str]:
    for name in costs[0]:
        cells = (
            f"{of[name].bytes / 1e6:,.0f} MB, {of[name].flops / 1e9:,.0f} GFLOP, "
            f"{of[name].seconds * 1e6:,.0f} µs"
            for of in costs
        )
        yield f"| {name} | {' | '.join(cells)} |"


def table() -> str:
    """Markdown: the kernels, the layer's own work, and what share of it eviction adds."""
    ours, theirs = [[fn(length) for length in LENGTHS] for fn in (eviction, prefill)]
    head = " | ".join(f"{length >> 10}k tokens" for length in LENGTHS)
    lines = [f"| | {head} |", f"|---{'|---' * len(LENGTHS)}|", *_rows(ours), *_rows(theirs)]
    shares = []
    for of, layer in zip(ours, theirs, strict=True):
        taken = sum(cost.seconds for name, cost in of.items() if not name.startswith("("))
        shares.append(f"{taken / sum(cost.seconds for cost in layer.values()):.0%}")
    return "\n".join([*lines, f"| **eviction / prefill** | {' | '.join(shares)} |"])
