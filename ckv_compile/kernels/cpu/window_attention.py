"""Attention of the observation window summed over its queries, in two passes over the keys: C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes

_SOURCE = (
    PRELUDE
    + TILES
    + r"""
// Keys of a task; queries stand side by side in the lanes, padded to whole panels for each head.
constexpr int64_t CHUNK = 252;
static_assert(CHUNK % ROWS == 0, "a chunk is whole tiles");

template <typename scalar>
struct Window {
  const float* queries;    // [batch, heads, padded, depth], times the scale
  const scalar* key;       // [batch, kv_heads, kv_len, depth]
  const int64_t* strides;  // of the key
  const int64_t* last_seen;  // [batch, padded]: the last key that each query sees
  const bool* real;        // [batch, kv_len], or null
  int64_t kv_heads, groups, padded, depth, kv_len;
  float softcap;           // 0 for none

  int64_t heads() const { return kv_heads * groups; }

  // A panel [depth][COLUMNS] of a head's queries.
  void pack(int64_t b, int64_t head, int64_t column, float* panel) const {
    const float* from = queries + ((b * heads() + head) * padded + column) * depth;
    for (int64_t q = 0; q < COLUMNS; ++q)
      for (int64_t d = 0; d < depth; ++d) panel[d * COLUMNS + q] = from[q * depth + d];
  }

  // Logits of a panel's queries on the ROWS keys from `start`, of which `some` are there.
  void logits(int64_t b, int64_t g, int64_t column, const float* panel, int64_t start,
              int64_t some, float* room, vec (&out)[ROWS][2]) const {
    int64_t stride;
    const float* rows = rows_of(key + b * strides[0] + g * strides[1] + start * strides[2],
                                strides[2], strides[3], some, depth, room, &stride);
    multiply(rows, stride, panel, depth, out);
    const int64_t* last = last_seen + b * padded + column;
    int64_t least = last[0];
    for (int64_t q = 1; q < COLUMNS; ++q) least = std::min(least, last[q]);
    for (int64_t r = 0; r < some; ++r) {
      if (softcap > 0.0f)
        for (int64_t side = 0; side < 2; ++side) out[r][side] = capped(out[r][side]);
      if (real && !real[b * kv_len + start + r]) out[r][0] = out[r][1] = vec{} - INFINITY;
      if (start + r > least)
        for (int64_t q = 0; q < COLUMNS; ++q)
          if (start + r > last[q]) out[r][q / LANES][q % LANES] = -INFINITY;
    }
  }

  // softcap * tanh(x / softcap)
  vec capped(vec x) const {
    const vec y = x / softcap;
    const vec t = exp_of_negative((y < 0.0f ? y : -y) * 2.0f);
    const vec size = (1.0f - t) / (1.0f + t) * softcap;
    return y < 0.0f ? -size : y == y ? size : y;
  }
};

template <typename scalar>
void summed(const Window<scalar>& w, const bool* asked, const float* sinks, int64_t batch,
            int64_t threads, float* out) {
  const int64_t chunks = (w.kv_len + CHUNK - 1) / CHUNK, heads = w.heads();
  const int64_t tasks = batch * w.kv_heads * chunks, queries = w.groups * w.padded;
  std::vector<float> largest(tasks * queries), sums(tasks * queries);
  std::vector<float> lse(batch * heads * w.padded);
  #pragma omp parallel num_threads(threads)
  {
    std::vector<float> panel(w.depth * COLUMNS), room(ROWS * w.depth);
    vec tile[ROWS][2];
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / chunks, b = pair / w.kv_heads, g = pair % w.kv_heads;
      const int64_t start = task % chunks * CHUNK, end = std::min(start + CHUNK, w.kv_len);
      for (int64_t column = 0; column < queries; column += COLUMNS) {
        const int64_t head = g * w.groups + column / w.padded, at = column % w.padded;
        w.pack(b, head, at, panel.data());
        // Not -inf, which nothing can be subtracted from.
        vec most[2] = {vec{} - 3.0e38f, vec{} - 3.0e38f}, total[2] = {};
        for (int64_t j = start; j < end; j += ROWS) {
          const int64_t some = std::min(ROWS, end - j);
          w.logits(b, g, at, panel.data(), j, some, room.data(), tile);
          for (int64_t side = 0; side < 2; ++side) {
            vec top = most[side];
            for (int64_t r = 0; r < some; ++r)
              top = top > tile[r][side] ? top : tile[r][side];
            total[side] *= exp_of_negative(most[side] - top);
            for (int64_t r = 0; r < some; ++r)
              total[side] += exp_of_negative(tile[r][side] - top);
            most[side] = top;
          }
        }
        for (int64_t side = 0; side < 2; ++side) {
          store(&largest[task * queries + column + side * LANES], most[side]);
          store(&sums[task * queries + column + side * LANES], total[side]);
        }
      }
    }
    #pragma omp for
    for (int64_t i = 0; i < batch * heads * w.padded; ++i) {
      const int64_t pair = i / queries, r = i % queries, b = pair / w.kv_heads;
      const int64_t head = pair % w.kv_heads * w.groups + r / w.padded;
      float most = sinks ? sinks[head] : -INFINITY;
      for (int64_t c = 0; c < chunks; ++c)
        most = std::max(most, largest[(pair * chunks + c) * queries + r]);
      float sum = sinks ? std::exp(sinks[head] - most) : 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = (pair * chunks + c) * queries + r;
        sum += sums[at] * std::exp(largest[at] - most);
      }
      // Who is not asked, or sees nothing, adds nothing.
      const bool counts = asked[b * w.padded + r % w.padded] && !(sum <= 0.0f);
      lse[i] = counts ? most + std::log(sum) : INFINITY;
    }
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / chunks, b = pair / w.kv_heads, g = pair % w.kv_heads;
      const int64_t start = task % chunks * CHUNK, end = std::min(start + CHUNK, w.kv_len);
      for (int64_t column = 0; column < queries; column += COLUMNS) {
        const int64_t head = g * w.groups + column / w.padded, at = column % w.padded;
        w.pack(b, head, at, panel.data());
        const float* norm = &lse[pair * queries + column];
        const vec left = load(norm), right = load(norm + LANES);
        float* to = out + (b * heads + head) * w.kv_len;
        for (int64_t j = start; j < end; j += ROWS) {
          const int64_t some = std::min(ROWS, end - j);
          w.logits(b, g, at, panel.data(), j, some, room.data(), tile);
          for (int64_t r = 0; r < some; ++r) {
            const vec seen =
                exp_of_negative(tile[r][0] - left) + exp_of_negative(tile[r][1] - right);
            to[j + r] = (at ? to[j + r] : 0.0f) + sum_of(seen);
          }
        }
      }
    }
  }
}

}  // namespace

extern "C" int64_t queries_of_a_panel() { return COLUMNS; }

#define EXPORT(scalar)                                                                            \
  extern "C" void summed_##scalar(                                                                \
      const float* queries, const void* key, const int64_t* strides, const int64_t* last_seen,    \
      const bool* asked, const bool* real, const float* sinks, int64_t batch, int64_t kv_heads,   \
      int64_t groups, int64_t padded, int64_t depth, int64_t kv_len, int64_t threads,             \
      float softcap, float* out) {                                                                \
    const Window<scalar> w{queries,  static_cast<const scalar*>(key), strides, last_seen, real,   \
                           kv_heads, groups, padded, depth, kv_len, softcap};                     \
    summed(w, asked, sinks, batch, threads, out);                                                 \
  }
EXPORT(float)
EXPORT(bfloat16)
EXPORT(half)
"""
)


def _library() -> Any:
    return library(_SOURCE, "the window's attention, which is then made by library calls")


def takes(key: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel is for these operands."""
    return bias is None and key.dtype in SUFFIX and _library() is not None


def summed_attention(
    rows: Tensor,
    key: Tensor,
    last_seen: Tensor,
    asked: Tensor,
    softcap: float | None,
    real: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention on every key, summed over the queries that are asked.

    Args:
        rows: ``[B, H, W, D]`` float32, the window's queries times the scale.
        key: ``[B, Hkv, K, D]``, float32, bfloat16 or float16.
        last_seen: ``[B, W]`` int64, the last key that each query sees.
        asked: ``[B, W]`` bool.
        softcap: logits are ``softcap * tanh(logits / softcap)``, or None.
        real: ``[B, K]`` bool, False at keys that nobody sees, or None.
        sinks: ``[H]``, logits of one more key for each head, or None.

    Returns:
        ``[B, H, K]`` float32.
    """
    (batch, heads, window, depth), (kv_heads, kv_len) = rows.shape, key.shape[1:3]
    library = _library()
    missing = -window % library.queries_of_a_panel()
    rows = F.pad(rows, (0, 0, 0, missing)).contiguous()
    last_seen = F.pad(last_seen, (0, missing), value=kv_len).contiguous()
    asked = F.pad(asked, (0, missing)).contiguous()
    strides = torch.tensor(key.stride())
    real = None if real is None else real.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = rows.new_empty((batch, heads, kv_len))
    lengths = (batch, kv_heads, heads // kv_heads, window + missing, depth, kv_len)
    getattr(library, f"summed_{SUFFIX[key.dtype]}")(
        *map(pointer, (rows, key, strides, last_seen, asked, real, sinks)),
        *sizes(*lengths, torch.get_num_threads()),
        ctypes.c_float(softcap or 0.0),
        pointer(out),
    )
    return out
