"""How much a compiler can gain on a prefill: the parts of an eager layer, and how fast they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import parser, report, timed, watched
from models import smollm2
from torch import nn


def measure(layer: nn.Module, rotary: nn.Module, tokens: int, repeats: int) -> dict[str, object]:
    """One row: a whole layer, its products with weights alone, its attention alone."""
    hidden, positions = torch.randn(1, tokens, 576), torch.arange(tokens)[None]
    angles = rotary(hidden, positions)
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    operands = [torch.randn(tokens, linear.in_features) for linear in linears]
    query, key, value = torch.randn(3, 1, 9, tokens, 64)

    def products() -> None:
        for linear, operand in zip(linears, operands, strict=True):
            linear(operand)

    parts = {
        "layer": lambda: layer(hidden, position_embeddings=angles, position_ids=positions),
        "products": products,
        "attention": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
    }
    seconds = timed(parts, repeats)
    weights = sum(linear.weight.numel() for linear in linears)
    work = {"products": 2 * tokens * weights, "attention": 2 * 9 * tokens**2 * 64}
    speeds = {name: flops / seconds[name] for name, flops in work.items()}
    fastest = max(speeds.values())
    return {
        "tokens": tokens,
        **{f"{name} ms": 1e3 * of for name, of in seconds.items()},
        **{f"{name} GFLOP/s": of / 1e9 for name, of in speeds.items()},
        # All of both at the faster one's speed, and everything else free.
        "most gain": seconds["layer"] * fastest / sum(work.values()),
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    model = smollm2(1).model
    lengths = (512, 2048) if options.quick else (512, 2048, 4096)
    with torch.no_grad():
        rows = [
            measure(model.layers[0], model.rotary_emb, n, 3 * options.repeats)
            for n in watched(lengths, "ceiling")
        ]
    report("ceiling", "One eager layer of SmolLM2's shape, float32", rows, options)


if __name__ == "__main__":
    main()
