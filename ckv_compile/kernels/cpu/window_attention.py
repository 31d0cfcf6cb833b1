"""Attention of the observation window summed over its queries, in two passes over the keys: C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes, source_for

_SOURCE = (
    PRELUDE
    + TILES
    + r"""
// Keys of a task.
constexpr int64_t CHUNK = 252;
static_assert(CHUNK % ROWS == 0 && ROWS <= LANES, "a chunk is whole tiles, of few rows");
// Logits that the second pass finds as the first one left them, 4 MiB in all, however long the keys
// are: of the first chunks of each head. The others' are made twice.
constexpr int64_t HELD = int64_t{1} << 20;

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
  // They are left in `held`, or read from there if they are `made`; null to make them.
  template <typename function>
  void for_logits(int64_t pair, int64_t start, int64_t end, float* room, float* held, bool made,
                  const function& f) const {
    const int64_t b = pair / kv_heads, count = groups * panels;
    const scalar* keys = key + b * strides[0] + pair % kv_heads * strides[1];
    const float* from = queries + pair * count * depth * COLUMNS;
    const bool found = held && made;
    vec tile[ROWS][2];
    for (int64_t j = start; j < end; j += ROWS) {
      const int64_t some = std::min(ROWS, end - j);
      if (!found)
        copy_rows(keys + j * strides[2], strides[2], strides[3], some, depth, room);
      for (int64_t panel = 0; panel < count; ++panel) {
        if (found) {
          std::memcpy(tile, held, sizeof(tile));
        } else {
          multiply(room, from + panel * depth * COLUMNS, depth, tile);
          hide(b, b * panels + panel % panels, j, some, tile);
          if (held) std::memcpy(held, tile, sizeof(tile));
        }
        if (held) held += ROWS * COLUMNS;
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

// What a call asks: its queries as the lanes hold them, and which keys are scored.
struct Asked {
  int64_t panels;
  std::vector<float> queries;
  std::vector<int64_t> last_seen, least_seen;
  std::vector<char> asked;   // [batch, panels * COLUMNS]
  std::vector<char> prefix;  // [batch, kv_len]; empty for all

  // The last `size` queries, real ones if some are pads: in a causal call of the last q_len keys.
  template <typename scalar>
  Asked(const scalar* query, const int64_t* strides, const bool* real, int64_t batch,
        int64_t heads, int64_t q_len, int64_t kv_len, int64_t depth, int64_t size, float scale,
        bool causal)
      : panels((size + COLUMNS - 1) / COLUMNS),
        queries(batch * heads * panels * depth * COLUMNS),
        last_seen(batch * panels * COLUMNS, kv_len),
        least_seen(batch * panels, kv_len),
        asked(batch * panels * COLUMNS),
        prefix(causal ? batch * kv_len : 0) {
    const int64_t padded = panels * COLUMNS, first = causal ? kv_len - q_len : 0;
    std::vector<int64_t> at;  // positions of the tokens, or steps of the queries
    for (int64_t b = 0; b < batch; ++b) {
      at.clear();
      for (int64_t j = 0; j < (causal ? kv_len : q_len); ++j)
        if (!real || real[b * kv_len + j]) at.push_back(j);
      const int64_t before = static_cast<int64_t>(at.size()) - size;
      for (int64_t i = 0; causal && i < before; ++i) prefix[b * kv_len + at[i]] = 1;
      for (int64_t t = 0; t < size; ++t) {
        const int64_t rank = std::max(t + before, int64_t{0});
        const int64_t position = at.empty() ? 0 : at[rank], column = b * padded + t;
        const int64_t last = last_seen[column] = causal ? position : kv_len - 1;
        int64_t& least = least_seen[column / COLUMNS];
        least = std::min(least, last);
        asked[column] = causal ? position >= first : t + before >= 0;
        const scalar* row =
            query + b * strides[0] + std::max(position - first, int64_t{0}) * strides[2];
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t panel = (b * heads + head) * panels + t / COLUMNS;
          float* to = &queries[panel * depth * COLUMNS + t % COLUMNS];
          for (int64_t d = 0; d < depth; ++d)
            to[d * COLUMNS] = as_float(row[head * strides[1] + d * strides[3]]) * scale;
        }
      }
    }
  }
};

// The larger, and NaN if either is.
inline float larger(float x, float y) { return x > y || x != x ? x : y; }

// Mean attention of the queries that are asked, the largest of `kernel` neighbours in the prefix,
// and the mean over the group, [batch, kv_heads, kv_len].
template <typename scalar>
void scores(const Window<scalar>& w, const char* asked, const float* sinks, const char* prefix,
            int64_t batch, int64_t kernel, int64_t threads, float* out) {
  const int64_t chunks = (w.kv_len + CHUNK - 1) / CHUNK, heads = w.heads();
  const int64_t padded = w.panels * COLUMNS, queries = w.groups * padded;
  const int64_t tasks = batch * w.kv_heads * chunks;
  std::vector<float> largest(tasks * queries), sums(tasks * queries);
  std::vector<float> lse(batch * heads * padded), attention(batch * heads * w.kv_len);
  const int64_t chunk_size = batch * w.kv_heads * queries * CHUNK;
  const int64_t held_chunks = std::min(chunks, HELD / std::max(chunk_size, int64_t{1}));
  const std::unique_ptr<float[]> logits(new float[held_chunks * chunk_size]);  // not set to zero
  const auto held = [&](int64_t task) -> float* {
    const int64_t pair = task / chunks, chunk = task % chunks;
    if (chunk >= held_chunks) return nullptr;
    return &logits[(pair * held_chunks + chunk) * queries * CHUNK];
  };
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
      w.for_logits(task / chunks, start, end, room.data(), held(task), false, add);
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
        vec weights[LANES] = {};
        for (int64_t r = 0; r < some; ++r)
          weights[r] = (left == INFINITY ? vec{} : exp_of_negative(tile[r][0] - left)) +
                       (right == INFINITY ? vec{} : exp_of_negative(tile[r][1] - right));
        const vec sums = sums_of(weights);
        for (int64_t r = 0; r < some; ++r) to[r] += sums[r];
      };
      w.for_logits(pair, start, end, room.data(), held(task), true, add);
      const int64_t count = std::count(asked + b * padded, asked + (b + 1) * padded, 1);
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

using scalar = SCALAR;

extern "C" void window_scores(const scalar* query, const int64_t* query_strides,
                              const scalar* key, const int64_t* strides, const bool* real,
                              const float* sinks, int64_t batch, int64_t kv_heads, int64_t groups,
                              int64_t q_len, int64_t kv_len, int64_t depth, int64_t window,
                              int64_t kernel, int64_t causal, int64_t threads, float scale,
                              float softcap, float* out) {
  const Asked a(query, query_strides, real, batch, kv_heads * groups, q_len, kv_len, depth, window,
                scale, causal);
  const Window<scalar> w{a.queries.data(),    key,      strides,  a.last_seen.data(),
                         a.least_seen.data(), real,     kv_heads, groups,
                         a.panels,            depth,    kv_len,   softcap};
  scores(w, a.asked.data(), sinks, causal ? a.prefix.data() : nullptr, batch, kernel, threads, out);
}
"""
)


def _library(dtype: torch.dtype) -> Any:
    source = source_for(_SOURCE, SCALAR=dtype)
    return library(source, "the window's attention, which is then made by library calls")


def takes(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel is for these operands."""
    known = key.device.type == "cpu" and key.dtype in SUFFIX and query.dtype == key.dtype
    return bias is None and known and query.shape[2] > 0 and _library(key.dtype) is not None


def scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    window_size: int,
    kernel_size: int,
    softcap: float | None,
    real: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Mean attention of the window on every key, pooled, mean over the group.

    Args as of :func:`ckv_compile.kernels.window_attention.window_attention`, float32, bfloat16 or
    float16. Not ``causal``: every query sees all keys, and all of these are scored.

    Returns:
        ``[B, Hkv, K]`` float32; 0 where a key is not scored.
    """
    (batch, heads, q_len, depth), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    strides = (torch.tensor(one.stride(), device="cpu") for one in (query, key))
    query_strides, key_strides = strides
    real = None if real is None else real.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = key.new_empty((batch, kv_heads, kv_len), dtype=torch.float32)
    lengths = (batch, kv_heads, heads // kv_heads, q_len, kv_len, depth, window_size, kernel_size)
    _library(key.dtype).window_scores(
        *map(pointer, (query, query_strides, key, key_strides, real, sinks)),
        *sizes(*lengths, causal, torch.get_num_threads()),
        ctypes.c_float(scale),
        ctypes.c_float(softcap or 0.0),
        pointer(out),
    )
    return out
