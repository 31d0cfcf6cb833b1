"""Two-stage selection without sorting: C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, library, pointer, sizes

# Shared with the norms, whose library selects by norms that it makes on the way.
SELECTION = r"""
// An integer that orders like the score: NaN is the lowest, infinities are the largest numbers, and
// of equal scores the later position is the larger. `first` is above and a pad below all of them.
inline int64_t key_of(float score, bool first, bool real, int64_t position) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) bits = 0xff7fffffu;
  if (size == 0x7f800000u) bits -= 1;
  if (size == 0) bits = 0;
  int32_t ordered = static_cast<int32_t>(bits);
  if (ordered < 0) ordered ^= 0x7fffffff;
  if (first) ordered = INT32_MAX;
  if (!real) ordered = INT32_MIN;
  return static_cast<int64_t>(ordered) * (int64_t{1} << 32) + position;
}

// The least of the `count` largest keys; above all keys if count is 0.
inline int64_t threshold(std::vector<int64_t> keys, int64_t count) {
  if (count <= 0) return INT64_MAX;
  std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end(), std::greater<int64_t>());
  return keys[count - 1];
}

// What one head of one row keeps.
struct Selection {
  const float* base;           // [batch, kv_heads, kv_len]
  const bool* real;            // [batch, kv_len], or null
  const int64_t* row_budgets;  // [batch], or null
  int64_t kv_heads, kv_len, budget, window, numerator, denominator;

  bool is_real(int64_t pair, int64_t i) const {
    return !real || real[pair / kv_heads * kv_len + i];
  }
  int64_t row_budget(int64_t pair) const {
    return row_budgets ? std::min(row_budgets[pair / kv_heads], budget) : budget;
  }

  void make_keys(int64_t pair, const float* scores, const bool* first,
                 std::vector<int64_t>& keys) const {
    for (int64_t i = 0; i < kv_len; ++i)
      keys[i] = key_of(scores[i], first[i], is_real(pair, i), i);
  }

  // Marks the window and, if there are two stages, the best by attention; how many may follow.
  int64_t keep_first(int64_t pair, bool stages, bool* kept, std::vector<int64_t>& keys) const {
    int64_t count = 0, marked = 0;
    std::fill(kept, kept + kv_len, false);
    for (int64_t i = kv_len - 1; i >= 0; --i)
      if (is_real(pair, i)) kept[i] = count++ < window;
    marked = std::min(window, count);
    const int64_t first = std::min(numerator * row_budget(pair) / denominator, count);
    if (stages && first > marked) {
      make_keys(pair, base + pair * kv_len, kept, keys);
      const int64_t least = threshold(keys, first);
      for (int64_t i = 0; i < kv_len; ++i) kept[i] = keys[i] >= least;
      marked = first;
    }
    return std::max(row_budget(pair) - marked, int64_t{0});
  }

  // Positions, ascending: what is marked first, then the best by their scores.
  void choose(int64_t pair, const float* scores, const bool* kept, std::vector<int64_t>& keys,
              int64_t* out) const {
    make_keys(pair, scores, kept, keys);
    const int64_t least = threshold(keys, row_budget(pair));
    out += pair * budget;
    out = std::fill_n(out, budget - row_budget(pair), 0);
    for (int64_t i = 0; i < kv_len; ++i)
      if (keys[i] >= least) *out++ = i;
  }
};
"""

_SOURCE = (
    PRELUDE
    + SELECTION
    + r"""
}  // namespace

extern "C" void choose(const float* base, const float* scores, const bool* real,
                       const int64_t* row_budgets, int64_t batch, int64_t kv_heads, int64_t kv_len,
                       int64_t budget, int64_t window, int64_t numerator, int64_t denominator,
                       int64_t threads, int64_t* out) {
  const Selection s{base, real, row_budgets, kv_heads, kv_len, budget, window, numerator,
                    denominator};
  #pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> keys(kv_len);
    std::vector<char> kept(kv_len);
    bool* marks = reinterpret_cast<bool*>(kept.data());
    #pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < batch * kv_heads; ++pair) {
      s.keep_first(pair, scores != nullptr, marks, keys);
      s.choose(pair, (scores ? scores : base) + pair * kv_len, marks, keys, out);
    }
  }
}
"""
)


def _library() -> Any:
    return library(_SOURCE, "the selection, which is then made by library calls")


def takes(base: Tensor) -> bool:
    """Whether the kernel is for these operands."""
    return base.device.type == "cpu" and _library() is not None


def choose(
    base: Tensor,
    scores: Tensor | None,
    budget: int,
    window_size: int,
    ratio: list[int],
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> Tensor:
    """What :func:`ckv_compile.kernels.select.select` keeps, ``[B, Hkv, budget]``.

    Args:
        scores: of the second stage, ``[B, Hkv, K]`` float32; None where ``base`` decides alone.
        budget: below K.
        ratio: numerator and denominator of the first stage's share.
    """
    (batch, kv_heads, kv_len), threads = base.shape, torch.get_num_threads()
    operands = [None if x is None else x.contiguous() for x in (base, scores, real, row_budgets)]
    out = base.new_empty((batch, kv_heads, budget), dtype=torch.int64)
    numbers = (batch, kv_heads, kv_len, budget, window_size, *ratio, threads)
    _library().choose(*map(pointer, operands), *sizes(*numbers), pointer(out))
    return out
