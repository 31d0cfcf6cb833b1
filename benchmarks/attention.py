"""Attention of a decode step over one layer's cache: ours, against PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import parser, report, timed, watched

from ckv_compile.kernels import decode_attention  # noqa: F401  registers the op

# KV heads, queries of a group, head_dim
SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3.1-8B": (8, 4, 128), "Llama-2-7B": (32, 1, 128)}
# What is read in turns, so that no processor's cache holds it.
LEAST_BYTES = 128 << 20


def measure(shape: str, kv_len: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """One row: correct first, then the time of one layer, a batch of one."""
    heads, groups, head_dim = SHAPES[shape]
    layers = max(2, LEAST_BYTES // (2 * heads * kv_len * head_dim * dtype.itemsize))
    query = torch.randn(1, heads, groups, head_dim).to(dtype)
    # A buffer with room for more, as a cache has it.
    room = (layers, 1, heads, kv_len + 128, head_dim)
    keys, values = (torch.randn(room).to(dtype)[..., :kv_len, :] for _ in range(2))
    attend, scale = torch.ops.ckv_compile.decode_attention.default, head_dim**-0.5

    def ours() -> None:
        for key, value in zip(keys, values, strict=True):
            attend(query, key, value, None, scale)

    def pytorchs() -> None:
        for key, value in zip(keys, values, strict=True):
            F.scaled_dot_product_attention(query, key, value)

    got = attend(query, keys[0], values[0], None, scale)
    exact = F.scaled_dot_product_attention(*(one.float() for one in (query, keys[0], values[0])))
    torch.testing.assert_close(got, exact.to(dtype), rtol=1.6e-2, atol=1e-5)
    whole = torch.empty(layers * 2 * heads * kv_len * head_dim, dtype=dtype)
    to = torch.empty_like(whole)
    moves = {"ours": ours, "PyTorch's": pytorchs, "copy": lambda: to.copy_(whole)}
    seconds = timed(moves, repeats)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "entries": kv_len,
        **{f"{name} us": 1e6 * of / layers for name, of in seconds.items()},
        "PyTorch's / ours": seconds["PyTorch's"] / seconds["ours"],
        # A copy writes as much as it reads.
        "ours / half a copy": 2 * seconds["ours"] / seconds["copy"],
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    lengths = (819,) if options.quick else (205, 819, 8192)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    sizes = [(shape, n, dtype) for shape in SHAPES for dtype in dtypes for n in lengths]
    with torch.no_grad():
        rows = [measure(*one, max(options.repeats, 10)) for one in watched(sizes, "attention")]
    report("attention", "One decode step over one layer's cache, a batch of one", rows, options)


if __name__ == "__main__":
    main()
