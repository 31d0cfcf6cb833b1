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
// Keys of a task.
constexpr int64_t CHUNK = 252;
static_assert(CHUNK % ROWS == 0, "a chunk is whole tiles");

template <typename scalar>
struct Window {
  // A head's queries stand side by side in the lanes: [batch, heads, panels, depth, COLUMNS].
  const float* queries;
  const scalar* key;         // [batch, kv_heads, kv_len, depth]
  const int64_t* strides;    // of the key
  const int64_t* last_seen;  // [batch, panels * COLUMNS]: the last key that each query sees
  const int64_t* least_seen;  // [batch, panels]: the least of those
  const bool* real;          // [batch, kv_len], or null
  int64_t kv_heads, groups, panels, depth, kv_len;
  float softcap;  // 0 for none

  int64_t heads() const { return kv_heads * groups; }

  // Calls f(j, some, panel of the group's, logits of its queries on the `some` keys from j).
  template <typename function>
  void for_logits(int64_t pair, int64_t start, int64_t end, float* room, const function& f) const {
    const int64_t b = pair / kv_heads, count = groups * panels;
    const scalar* keys = key + b * strides[0] + pair % kv_heads * strides[1];
    const float* from = queries + pair * count * depth * COLUMNS;
    vec tile[ROWS][2];
    for (int64_t j = start; j < end; j += ROWS) {
      const int64_t some = std::min(ROWS, end - j);
      copy_rows(keys + j * strides[2], strides[2], strides[3], some, depth, room);
      for (int64_t panel = 0; panel < count; ++panel) {
        multiply(room, depth, from + panel * depth * COLUMNS, depth, tile);
        hide(b, b * panels + panel % panels, j, some, tile);
        f(j, some, panel, tile);
      }
    }
  }

  // The cap, and -inf where a query does not see a key.
  void hide(int64_t b, int64_t panel, int64_t start, int64_t some, vec (&out)[ROWS][2]) const {
    const int64_t* last = last_seen + panel * COLUMNS;
    const int64_t least = least_seen[panel];
    if (softcap <= 0.0f && !real && start + some <= least + 1) return;
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

// The larger, and NaN if either is.
inline float larger(float x, float y) { return x > y || x != x ? x : y; }

// Mean attention of the queries that are asked, the largest of `kernel` neighbours in the prefix,
// and the mean over the group, [batch, kv_heads, kv_len].
template <typename scalar>
void scores(const Window<scalar>& w, const bool* asked, const float* sinks, const bool* prefix,
            int64_t batch, int64_t kernel, int64_t threads, float* out) {
  const int64_t chunks = (w.kv_len + CHUNK - 1) / CHUNK, heads = w.heads();
  const int64_t padded = w.panels * COLUMNS, queries = w.groups * padded;
  const int64_t tasks = batch * w.kv_heads * chunks;
  std::vector<float> largest(tasks * queries), sums(tasks * queries);
  std::vector<float> lse(batch * heads * padded), attention(batch * heads * w.kv_len);
  #pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(ROWS * w.depth), best(CHUNK);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t start = task % chunks * CHUNK, end = std::min(start + CHUNK, w.kv_len);
      float *most = &largest[task * queries], *total = &sums[task * queries];
      // Not -inf, which nothing can be subtracted from.
      std::fill_n(most, queries, -3.0e38f);
      const auto add = [&](int64_t, int64_t some, int64_t panel, const vec (&tile)[ROWS][2]) {
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t at = panel * COLUMNS + side * LANES;
          const vec before = load(most + at);
          vec top = before;
          for (int64_t r = 0; r < some; ++r) top = top > tile[r][side] ? top : tile[r][side];
          vec sum = load(total + at) * exp_of_negative(before - top);
          for (int64_t r = 0; r < some; ++r) sum += exp_of_negative(tile[r][side] - top);
          store(most + at, top);
          store(total + at, sum);
        }
      };
      w.for_logits(task / chunks, start, end, room.data(), add);
    }
    #pragma omp for
    for (int64_t i = 0; i < batch * heads * padded; ++i) {
      const int64_t pair = i / queries, r = i % queries, b = pair / w.kv_heads;
      const int64_t head = pair % w.kv_heads * w.groups + r / padded;
      float most = sinks ? sinks[head] : -INFINITY;
      for (int64_t c = 0; c < chunks; ++c)
        most = std::max(most, largest[(pair * chunks + c) * queries + r]);
      float sum = sinks ? std::exp(sinks[head] - most) : 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = (pair * chunks + c) * queries + r;
        sum += sums[at] * std::exp(largest[at] - most);
      }
      // Who is not asked, or sees nothing, adds nothing.
      const bool counts = asked[b * padded + r % padded] && !(sum <= 0.0f);
      lse[i] = counts ? most + std::log(sum) : INFINITY;
    }
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / chunks, b = pair / w.kv_heads;
      const int64_t start = task % chunks * CHUNK, end = std::min(start + CHUNK, w.kv_len);
      const auto add = [&](int64_t j, int64_t some, int64_t panel, const vec (&tile)[ROWS][2]) {
        const float* norm = &lse[pair * queries + panel * COLUMNS];
        const vec left = load(norm), right = load(norm + LANES);
        float* to = &attention[(pair * w.groups + panel / w.panels) * w.kv_len + j];
        // Lanes that add nothing may hold NaN all the same: zero times an infinite key.
        for (int64_t r = 0; r < some; ++r)
          to[r] += sum_of((left == INFINITY ? vec{} : exp_of_negative(tile[r][0] - left)) +
                          (right == INFINITY ? vec{} : exp_of_negative(tile[r][1] - right)));
      };
      w.for_logits(pair, start, end, room.data(), add);
      const int64_t count = std::count(asked + b * padded, asked + (b + 1) * padded, true);
      for (int64_t member = 0; member < w.groups; ++member) {
        float* to = &attention[(pair * w.groups + member) * w.kv_len];
        for (int64_t j = start; j < end; ++j)
          to[j] = !prefix || prefix[b * w.kv_len + j] ? to[j] / std::max(count, int64_t{1})
                                                       : -INFINITY;
      }
    }
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / chunks, b = pair / w.kv_heads;
      const int64_t start = task % chunks * CHUNK, end = std::min(start + CHUNK, w.kv_len);
      float* to = out + pair * w.kv_len;
      std::fill(to + start, to + end, 0.0f);
      for (int64_t member = 0; member < w.groups; ++member) {
        const float* from = &attention[(pair * w.groups + member) * w.kv_len];
        std::copy(from + start, from + end, best.begin());
        for (int64_t by = -(kernel / 2); by <= kernel / 2; ++by) {
          const int64_t first = std::max(start, -by), last = std::min(end, w.kv_len - by);
          for (int64_t j = first; j < last; ++j)
            best[j - start] = larger(from[j + by], best[j - start]);
        }
        for (int64_t j = start; j < end; ++j) to[j] += best[j - start];
      }
      for (int64_t j = start; j < end; ++j)
        to[j] = !prefix || prefix[b * w.kv_len + j] ? to[j] / w.groups : 0.0f;
    }
  }
}

}  // namespace

extern "C" int64_t queries_of_a_panel() { return COLUMNS; }

#define EXPORT(scalar)                                                                            \
  extern "C" void scores_##scalar(                                                                \
      const float* queries, const void* key, const int64_t* strides, const int64_t* last_seen,    \
      const int64_t* least_seen, const bool* asked, const bool* real, const float* sinks,         \
      const bool* prefix, int64_t batch, int64_t kv_heads, int64_t groups, int64_t panels,        \
      int64_t depth, int64_t kv_len, int64_t kernel, int64_t threads, float softcap,              \
      float* out) {                                                                               \
    const Window<scalar> w{queries,   static_cast<const scalar*>(key),                            \
                           strides,   last_seen,                                                  \
                           least_seen, real,                                                      \
                           kv_heads,  groups,                                                     \
                           panels,    depth,                                                      \
                           kv_len,    softcap};                                                   \
    scores(w, asked, sinks, prefix, batch, kernel, threads, out);                                 \
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


def scores(
    rows: Tensor,
    key: Tensor,
    last_seen: Tensor,
    asked: Tensor,
    softcap: float | None,
    real: Tensor | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    kernel_size: int,
) -> Tensor:
    """Mean attention of the queries that are asked on every key, pooled, mean over the group.

    Args:
        rows: ``[B, H, W, D]`` float32, the window's queries times the scale.
        key: ``[B, Hkv, K, D]``, float32, bfloat16 or float16.
        last_seen: ``[B, W]`` int64, the last key that each query sees.
        asked: ``[B, W]`` bool.
        softcap: logits are ``softcap * tanh(logits / softcap)``, or None.
        real: ``[B, K]`` bool, False at keys that nobody sees, or None.
        sinks: ``[H]``, logits of one more key for each head, or None.
        prefix: ``[B, K]`` bool, the keys that are scored, or None for all; others score 0.
        kernel_size: neighbours of which the largest counts, odd.

    Returns:
        ``[B, Hkv, K]`` float32.
    """
    (batch, heads, window, depth), (kv_heads, kv_len) = rows.shape, key.shape[1:3]
    library = _library()
    columns = library.queries_of_a_panel()
    missing = -window % columns
    panels = F.pad(rows, (0, 0, 0, missing)).unflatten(2, (-1, columns)).transpose(3, 4)
    last_seen = F.pad(last_seen, (0, missing), value=kv_len)
    least_seen = last_seen.unflatten(1, (-1, columns)).amin(2)
    operands = (
        panels, key, torch.tensor(key.stride(), device="cpu"), last_seen, least_seen,
        F.pad(asked, (0, missing)), real, None if sinks is None else sinks.float(), prefix,
    )  # fmt: skip
    # The key is read by its strides.
    held = [x if x is None or x is key else x.contiguous() for x in operands]
    out = rows.new_empty((batch, kv_heads, kv_len))
    lengths = (batch, kv_heads, heads // kv_heads, panels.shape[2], depth, kv_len, kernel_size)
    getattr(library, f"scores_{SUFFIX[key.dtype]}")(
        *map(pointer, held),
        *sizes(*lengths, torch.get_num_threads()),
        ctypes.c_float(softcap or 0.0),
        pointer(out),
    )
    return out
