"""The projected norm against the loop over heads that writes ``V[h] @ W[h]`` to memory."""

from __future__ import annotations

import torch
from harness import mebibytes, parser, peak_extra_bytes, report, timed, watched
from torch import Tensor

from ckv_compile.kernels.projected_norm import projected_norm

# H, Hkv, D, E
SHAPES = {"SmolLM2-135M": (9, 3, 64, 576), "Llama-3.1-8B": (32, 8, 128, 4096)}


def loop(value: Tensor, weight: Tensor, heads: int) -> Tensor:
    """As it is written elsewhere: the whole ``[K, E]`` of each head, then its norm."""
    batch, kv_heads, kv_len, head_dim = value.shape
    matrices = weight.t().reshape(heads, head_dim, -1)
    norms = torch.zeros(batch, kv_heads, kv_len)
    for h in range(heads):
        norms[:, h * kv_heads // heads] += (
            (value[:, h * kv_heads // heads] @ matrices[h]).abs().sum(-1)
        )
    return norms / (heads // kv_heads)


def measure(model: str, kv_len: int, repeats: int) -> dict[str, object]:
    """One row: correct first, then time and memory."""
    heads, kv_heads, head_dim, hidden_size = SHAPES[model]
    value = torch.randn(1, kv_heads, kv_len, head_dim)
    weight = torch.randn(hidden_size, heads * head_dim)
    candidates = {
        "loop": lambda: loop(value, weight, heads),
        "l1": lambda: projected_norm(value, weight, False, heads, "l1"),
        "l2": lambda: projected_norm(value, weight, False, heads, "l2"),
    }
    torch.testing.assert_close(candidates["l1"](), candidates["loop"](), rtol=1e-4, atol=1e-2)
    seconds = timed(candidates, repeats)
    extra = {name: peak_extra_bytes(candidate) for name, candidate in candidates.items()}
    return {
        "model": model,
        "keys": kv_len,
        "loop ms": 1e3 * seconds["loop"],
        "L1 ms": 1e3 * seconds["l1"],
        "L2 ms": 1e3 * seconds["l2"],
        "loop / L1": seconds["loop"] / seconds["l1"],
        "loop / L2": seconds["loop"] / seconds["l2"],
        "loop MiB": mebibytes(extra["loop"]),
        "L1 MiB": mebibytes(extra["l1"]),
        "L2 MiB": mebibytes(extra["l2"]),
        "L1 / loop MiB": extra["l1"] / extra["loop"],
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    sizes = [(m, n) for m in SHAPES for n in ((2048,) if options.quick else (2048, 8192, 32768))]
    rows = [
        # A loop over 32k keys of Llama's shape takes a minute.
        measure(model, kv_len, options.repeats if kv_len * SHAPES[model][3] < 1 << 25 else 1)
        for model, kv_len in watched(sizes, "projected norm")
    ]
    report("projected_norm", "||v W_O||, one layer, float32", rows, options)


if __name__ == "__main__":
    main()
