"""Norms of projected values, reduced in registers: C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes

_SOURCE = (
    PRELUDE
    + TILES
    + r"""
// Values of a task: COLUMNS at a time, so that a head's matrix is read from the L2 cache.
constexpr int64_t BLOCK = 4 * COLUMNS;

// The projections of COLUMNS values [depth][COLUMNS] by a head's matrix, whose column e is at
// e * stride_e: the sum of their sizes, or if quadratic of their products with the values.
template <bool quadratic, typename weights>
void add_norms(const weights* matrix, int64_t stride_d, int64_t stride_e, const float* panel,
               int64_t depth, int64_t width, float* room, float* to) {
  vec sums[2] = {};
  for (int64_t e = 0; e < width; e += ROWS) {
    const int64_t some = std::min(ROWS, width - e);
    int64_t stride;
    const float* rows =
        rows_of(matrix + e * stride_e, stride_e, stride_d, some, depth, room, &stride);
    vec product[ROWS][2];
    multiply(rows, stride, panel, depth, product);
    for (int64_t r = 0; r < some; ++r)
      for (int64_t side = 0; side < 2; ++side) {
        const vec x = product[r][side];
        if (quadratic)
          sums[side] += x * load(panel + (e + r) * COLUMNS + side * LANES);
        else
          sums[side] += x < 0.0f ? -x : x;
      }
  }
  store(to, sums[0]);
  store(to + LANES, sums[1]);
}

// value[batch, kv_heads, ., depth] at index[batch, kv_heads, most] (all if null); the weight of
// query head h begins at h * depth * stride_d.
template <typename scalar, typename weights>
void norms(const scalar* value, const int64_t* strides, const weights* weight, int64_t stride_d,
           int64_t stride_e, const int64_t* index, const int64_t* counts, int64_t batch,
           int64_t kv_heads, int64_t groups, int64_t most, int64_t depth, int64_t width,
           bool quadratic, int64_t threads, float* out) {
  const int64_t blocks = (most + BLOCK - 1) / BLOCK, heads = kv_heads * groups;
  #pragma omp parallel num_threads(threads)
  {
    std::vector<float> panels(depth * BLOCK), room(ROWS * depth), found(COLUMNS);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * kv_heads * blocks; ++task) {
      const int64_t pair = task / blocks, b = pair / kv_heads, g = pair % kv_heads;
      const int64_t start = task % blocks * BLOCK;
      const int64_t count = std::min(BLOCK, counts[pair] - start);
      if (count <= 0) continue;
      std::fill(panels.begin(), panels.end(), 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = index ? index[pair * most + start + i] : start + i;
        const scalar* from = value + b * strides[0] + g * strides[1] + at * strides[2];
        float* to = &panels[i / COLUMNS * COLUMNS * depth + i % COLUMNS];
        for (int64_t d = 0; d < depth; ++d) to[d * COLUMNS] = as_float(from[d * strides[3]]);
      }
      for (int64_t h = g * groups; h < (g + 1) * groups; ++h) {
        const weights* matrix = weight + h * depth * stride_d;
        for (int64_t i = 0; i < count; i += COLUMNS) {
          const auto add = quadratic ? add_norms<true, weights> : add_norms<false, weights>;
          add(matrix, stride_d, stride_e, &panels[i * depth], depth, width, room.data(),
              found.data());
          const int64_t some = std::min(COLUMNS, count - i);
          std::copy(&found[0], &found[0] + some, out + (b * heads + h) * most + start + i);
        }
      }
    }
  }
}

}  // namespace

#define EXPORT(scalar, weights)                                                                  \
  extern "C" void norms_##scalar##_##weights(                                                    \
      const void* value, const int64_t* strides, const void* weight, const int64_t* index,       \
      const int64_t* counts, int64_t stride_d, int64_t stride_e, int64_t batch,                  \
      int64_t kv_heads, int64_t groups, int64_t most, int64_t depth, int64_t width,              \
      int64_t quadratic, int64_t threads, float* out) {                                          \
    norms(static_cast<const scalar*>(value), strides, static_cast<const weights*>(weight),       \
          stride_d, stride_e, index, counts, batch, kv_heads, groups, most, depth, width,        \
          quadratic != 0, threads, out);                                                         \
  }
EXPORT(float, float)
EXPORT(bfloat16, float)
EXPORT(half, float)
EXPORT(bfloat16, bfloat16)
EXPORT(half, half)
"""
)


def _library() -> Any:
    return library(_SOURCE, "projected norms, which are then made by library calls")


def takes(value: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is for these operands."""
    known = value.dtype in SUFFIX and weight.dtype in (torch.float32, value.dtype)
    return known and _library() is not None


def norms(
    value: Tensor,
    weight: Tensor,
    in_out: bool,
    heads: int,
    quadratic: bool,
    index: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """``sum_e |(v W)_e|`` of each query head, or ``v G v^T`` if ``quadratic``.

    Args:
        value: ``[B, Hkv, K, Dv]``, float32, bfloat16 or float16.
        weight: ``[E, H*Dv]``, or ``[H*Dv, E]`` if ``in_out``, float32 or of the value's dtype; the
            Gram matrices ``[H*Dv, Dv]`` if ``quadratic``.
        heads: H.
        index: ``[B, Hkv, M]`` int64, the entries asked for, all if None; the first ``counts``
            ``[B, Hkv]`` int64 of each head.

    Returns:
        ``[B, H, M]`` float32, M = K without an index; zero behind ``counts``.
    """
    batch, kv_heads, kv_len, depth = value.shape
    most = kv_len if index is None else index.shape[2]
    if counts is None:
        counts = torch.full((batch, kv_heads), most)
    out = torch.zeros(batch, heads, most, dtype=torch.float32)
    stride_d, stride_e = weight.stride() if in_out else weight.stride()[::-1]
    strides = torch.tensor(value.stride())
    index = None if index is None else index.contiguous()
    counts = counts.contiguous()
    width = weight.shape[1 if in_out else 0]
    run = getattr(_library(), f"norms_{SUFFIX[value.dtype]}_{SUFFIX[weight.dtype]}")
    run(
        *map(pointer, (value, strides, weight, index, counts)),
        *sizes(stride_d, stride_e, batch, kv_heads, heads // kv_heads, most, depth, width),
        *sizes(quadratic, torch.get_num_threads()),
        pointer(out),
    )
    return out
