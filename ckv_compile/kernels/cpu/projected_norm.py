"""Norms of projected values, reduced in registers, and a selection that makes few of them: C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes, source_for
from .select import SELECTION

_NORMS = r"""
// Values of a task: COLUMNS at a time, so that a head's matrix is read from the L2 cache.
constexpr int64_t BLOCK = 4 * COLUMNS;

// The projections of values, in panels [depth][COLUMNS], by a head's matrix, whose column e is at
// e * stride_e: the sum of their sizes; or if quadratic of their squares, by an upper triangular
// root, whose row e is at e * stride_e and begins with e zeros.
template <bool quadratic, typename weights>
void add_norms(const weights* matrix, int64_t stride_d, int64_t stride_e, const float* panels,
               int64_t count, int64_t depth, int64_t width, float* room, float* to) {
  vec sums[BLOCK / COLUMNS][2] = {};
  for (int64_t e = 0; e < width; e += ROWS) {
    const int64_t some = std::min(ROWS, width - e), first = quadratic ? e : 0;
    // Copied in any case: rows that are a power of two apart would take each other's place in L1.
    copy_rows(matrix + e * stride_e + first * stride_d, stride_e, stride_d, some, depth - first,
              room);
    for (int64_t i = 0; i * COLUMNS < count; ++i) {
      vec product[ROWS][2];
      multiply(room, panels + (i * depth + first) * COLUMNS, depth - first, product);
      for (int64_t r = 0; r < some; ++r)
        for (int64_t side = 0; side < 2; ++side) {
          const vec x = product[r][side];
          sums[i][side] += quadratic ? x * x : x < 0.0f ? -x : x;
        }
    }
  }
  std::memcpy(to, sums, sizeof(sums));
}

// What all functions below are given.
template <typename scalar>
struct Values {
  const scalar* value;     // [batch, kv_heads, kv_len, depth]
  const int64_t* strides;  // of the value
  int64_t batch, kv_heads, groups, kv_len, depth, threads;

  int64_t pairs() const { return batch * kv_heads; }
  const scalar* at(int64_t pair, int64_t i) const {
    return value + pair / kv_heads * strides[0] + pair % kv_heads * strides[1] + i * strides[2];
  }
};

// Element (d, e) of the matrix of query head h is at h * stride_h + d * stride_d + e * stride_e.
template <typename weights>
struct Weight {
  const weights* data;
  int64_t stride_h, stride_d, stride_e, width;
};

// The entries asked for: the first counts[pair] of index[pair * most ..], of all if that is null.
struct Asked {
  const int64_t* index;
  const int64_t* counts;
  int64_t most;
};

// A float's size as an integer, which orders as the floats do, infinities and NaN above all.
inline int32_t size_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffff;
}

// The norm [batch, heads, most] of each query head; if quadratic its square, NaN where a value is
// not finite: by how many of the root's zeros an infinity is multiplied depends on the processor.
template <bool quadratic, typename scalar, typename weights>
void norms(const Values<scalar>& v, const Weight<weights>& w, const Asked& asked, float* out) {
  const int64_t blocks = (asked.most + BLOCK - 1) / BLOCK, depth = v.depth;
  #pragma omp parallel num_threads(v.threads)
  {
    std::vector<float> panels(depth * BLOCK), room(ROWS * depth), found(BLOCK);
    std::vector<int32_t> largest(BLOCK);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < v.pairs() * blocks; ++task) {
      const int64_t pair = task / blocks, start = task % blocks * BLOCK;
      const int64_t count = std::min(BLOCK, asked.counts[pair] - start);
      if (count <= 0) continue;
      if (count % COLUMNS) std::fill(panels.begin(), panels.end(), 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = start + i;
        const scalar* from = v.at(pair, asked.index ? asked.index[pair * asked.most + at] : at);
        float* to = &panels[i / COLUMNS * COLUMNS * depth + i % COLUMNS];
        int32_t most = 0;
        for (int64_t d = 0; d < depth; ++d) {
          const float x = to[d * COLUMNS] = as_float(from[d * v.strides[3]]);
          if (quadratic) most = std::max(most, size_of(x));
        }
        largest[i] = most;
      }
      for (int64_t member = 0; member < v.groups; ++member) {
        const int64_t head = pair % v.kv_heads * v.groups + member;
        add_norms<quadratic>(w.data + head * w.stride_h, w.stride_d, w.stride_e, panels.data(),
                             count, depth, w.width, room.data(), found.data());
        for (int64_t i = 0; quadratic && i < count; ++i)
          if (largest[i] >= 0x7f800000) found[i] = NAN;
        std::copy_n(found.data(), count, out + (pair * v.groups + member) * asked.most + start);
      }
    }
  }
}

// Mean over the group; of all entries in the same order, so that equals stay equal.
void add_members(const float* each, int64_t groups, int64_t most, int64_t count, float* out) {
  std::copy_n(each, count, out);
  for (int64_t member = 1; member < groups; ++member)
    for (int64_t i = 0; i < count; ++i) out[i] += each[member * most + i];
  for (int64_t i = 0; i < count; ++i) out[i] /= groups;
}

// The mean norm [batch, kv_heads, most]: L1, or L2 by roots of Gram matrices.
template <bool quadratic, typename scalar, typename weights>
void mean_norms(const Values<scalar>& v, const Weight<weights>& w, const Asked& asked,
                float* out) {
  std::vector<float> each(v.pairs() * v.groups * asked.most);
  norms<quadratic>(v, w, asked, each.data());
  if (quadratic)
    for (float& x : each) x = std::sqrt(x);
  #pragma omp parallel for num_threads(v.threads)
  for (int64_t pair = 0; pair < v.pairs(); ++pair)
    add_members(&each[pair * v.groups * asked.most], v.groups, asked.most, asked.counts[pair],
                out + pair * asked.most);
}
"""

_BOUNDED = r"""
// What the mean L1 norm of each value is at most, [batch, kv_heads, kv_len]:
// ||x||_1 <= sqrt(width) ||x||_2, and what rounding can take from that (`lost`, of each head).
template <typename scalar>
void bounds(const Values<scalar>& v, const float* root, const float* lost, int64_t width,
            float* out) {
  const std::vector<int64_t> counts(v.pairs(), v.kv_len);
  std::vector<float> each(v.pairs() * v.groups * v.kv_len);
  const Weight<float> by_rows{root, v.depth * v.depth, 1, v.depth, v.depth};
  norms<true>(v, by_rows, Asked{nullptr, counts.data(), v.kv_len}, each.data());
  #pragma omp parallel for num_threads(v.threads)
  for (int64_t pair = 0; pair < v.pairs(); ++pair) {
    for (int64_t i = 0; i < v.kv_len; ++i) {
      const scalar* value = v.at(pair, i);
      int32_t bits = 0;
      for (int64_t d = 0; d < v.depth; ++d)
        bits = std::max(bits, size_of(as_float(value[d * v.strides[3]])));
      float largest;
      std::memcpy(&largest, &bits, sizeof(largest));
      for (int64_t member = 0; member < v.groups; ++member) {
        float& bound = each[(pair * v.groups + member) * v.kv_len + i];
        bound = std::sqrt(bound) + lost[pair % v.kv_heads * v.groups + member] * largest;
        // Squares of tiny numbers are zero, and these may not be.
        if (bound < 1e-15f && largest > 0.0f) bound = INFINITY;
        bound *= std::sqrt(1.002f * width);
      }
    }
    add_members(&each[pair * v.groups * v.kv_len], v.groups, v.kv_len, v.kv_len,
                out + pair * v.kv_len);
  }
}

// CriticalKV's selection with the exact norms of those entries alone that may be among the best.
//
// A bound of the norm ranks the entries that are left after the first stage. The worst of as many
// of the first ones as are to be kept, by its true score, is a threshold: whose bound is lower
// cannot be among the best. Returns how many norms were made.
template <typename scalar, typename weights>
int64_t select_bounded(const Selection& s, const Values<scalar>& v, const Weight<weights>& w,
                       const float* root, const float* lost, float epsilon, int64_t* out) {
  const int64_t kv_len = v.kv_len, pairs = v.pairs();
  std::vector<float> highest(pairs * kv_len), scores(pairs * kv_len, -INFINITY), worst(pairs);
  std::vector<char> kept_of(pairs * kv_len);
  std::vector<int64_t> counts(pairs), index;
  bool* kept = reinterpret_cast<bool*>(kept_of.data());
  bounds(v, root, lost, w.width, highest.data());

  const auto attention = [&](int64_t pair, int64_t i) {
    return s.base[pair * kv_len + i] + epsilon;
  };
  const auto is_open = [&](int64_t pair, int64_t i) {
    return s.is_real(pair, i) && !kept[pair * kv_len + i];
  };
  // True scores of what is in `index`, whose row of a pair is `most` long.
  const auto make = [&](int64_t most) {
    std::vector<float> norm(pairs * most);
    mean_norms<false>(v, w, Asked{index.data(), counts.data(), most}, norm.data());
    for (int64_t pair = 0; pair < pairs; ++pair) {
      worst[pair] = INFINITY;
      for (int64_t j = 0; j < counts[pair]; ++j) {
        const int64_t i = index[pair * most + j];
        const float score = attention(pair, i) * norm[pair * most + j];
        scores[pair * kv_len + i] = score == score ? score : -INFINITY;
        worst[pair] = std::min(worst[pair], scores[pair * kv_len + i]);
      }
    }
    int64_t made = 0;
    for (const int64_t count : counts) made += count;
    return made;
  };

  std::vector<std::vector<int64_t>> asked(pairs);
  #pragma omp parallel num_threads(v.threads)
  {
    std::vector<int64_t> keys(kv_len);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t left = s.keep_first(pair, true, kept + pair * kv_len, keys);
      int64_t open = 0;
      for (int64_t i = 0; i < kv_len; ++i) {
        // Whose bound is not a number is asked for its score; a negative attention's is at most 0.
        float& high = highest[pair * kv_len + i];
        high *= attention(pair, i);
        high = high == high ? std::max(high, 0.0f) : INFINITY;
        open += is_open(pair, i);
        keys[i] = key_of(high, false, is_open(pair, i), i);
      }
      const int64_t least = threshold(keys, std::min(left, open));
      for (int64_t i = 0; i < kv_len; ++i)
        if (keys[i] >= least) asked[pair].push_back(i);
    }
  }
  // As the rows of one array, as long as the longest.
  const auto gather = [&]() {
    int64_t most = 0;
    for (const auto& row : asked) most = std::max<int64_t>(most, row.size());
    index.assign(pairs * most, 0);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      counts[pair] = asked[pair].size();
      std::copy(asked[pair].begin(), asked[pair].end(), index.begin() + pair * most);
      asked[pair].clear();
    }
    return most;
  };
  int64_t made = make(gather());
  for (int64_t pair = 0; pair < pairs; ++pair) {
    // Infinite scores count as the largest number.
    const float least = std::min(worst[pair], std::numeric_limits<float>::max());
    for (int64_t i = 0; counts[pair] && i < kv_len; ++i) {
      const bool known = scores[pair * kv_len + i] != -INFINITY;
      if (!known && is_open(pair, i) && highest[pair * kv_len + i] >= least)
        asked[pair].push_back(i);
    }
  }
  made += make(gather());
  #pragma omp parallel num_threads(v.threads)
  {
    std::vector<int64_t> keys(kv_len);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; ++pair)
      s.choose(pair, &scores[pair * kv_len], kept + pair * kv_len, keys, out);
  }
  return made;
}

}  // namespace

using scalar = SCALAR;
using weights = WEIGHTS;

extern "C" void mean_norms_of(const scalar* value, const int64_t* strides, const weights* weight,
                              const int64_t* counts, int64_t stride_h, int64_t stride_d,
                              int64_t stride_e, int64_t width, int64_t batch, int64_t kv_heads,
                              int64_t groups, int64_t kv_len, int64_t depth, int64_t threads,
                              int64_t quadratic, float* out) {
  const Values<scalar> v{value, strides, batch, kv_heads, groups, kv_len, depth, threads};
  const Weight<weights> w{weight, stride_h, stride_d, stride_e, width};
  const Asked asked{nullptr, counts, kv_len};
  quadratic ? mean_norms<true>(v, w, asked, out) : mean_norms<false>(v, w, asked, out);
}

extern "C" int64_t select_bounded_by(
    const scalar* value, const int64_t* strides, const weights* weight, const float* root,
    const float* lost, const float* base, const bool* real, const int64_t* row_budgets,
    int64_t stride_h, int64_t stride_d, int64_t stride_e, int64_t width, int64_t batch,
    int64_t kv_heads, int64_t groups, int64_t kv_len, int64_t depth, int64_t threads,
    int64_t budget, int64_t window, int64_t numerator, int64_t denominator, float epsilon,
    int64_t* out) {
  const Values<scalar> v{value, strides, batch, kv_heads, groups, kv_len, depth, threads};
  const Weight<weights> w{weight, stride_h, stride_d, stride_e, width};
  const Selection s{base,   real,   row_budgets, kv_heads,    kv_len,
                    budget, window, numerator,   denominator};
  return select_bounded(s, v, w, root, lost, epsilon, out);
}
"""


# One library: its norms then agree to the bit with those of the selection.
_SOURCE = PRELUDE + TILES + SELECTION + _NORMS + _BOUNDED


def _library(value: Tensor, weight: Tensor) -> Any:
    source = source_for(_SOURCE, SCALAR=value.dtype, WEIGHTS=weight.dtype)
    return library(source, "projected norms, which are then made by library calls")


def takes(value: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is for these operands."""
    known = value.dtype in SUFFIX and weight.dtype in (torch.float32, value.dtype)
    known = known and value.device.type == "cpu"
    return known and _library(value, weight) is not None


def mean_norms(value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool) -> Tensor:
    """The mean over a group's query heads of ``||v W||_1``, or of ``||R v||_2``.

    Args:
        value: ``[B, Hkv, K, Dv]``, float32, bfloat16 or float16.
        weight: ``[E, H*Dv]``, or ``[H*Dv, E]`` if ``in_out``, float32 or of the value's dtype; the
            roots ``R`` ``[H*Dv, Dv]`` if ``quadratic``.
        heads: H.

    Returns:
        ``[B, Hkv, K]`` float32.
    """
    (batch, kv_heads, kv_len, _), strides = value.shape, torch.tensor(value.stride(), device="cpu")
    out = value.new_empty((batch, kv_heads, kv_len), dtype=torch.float32)
    counts = value.new_full((batch * kv_heads,), kv_len, dtype=torch.int64)
    _library(value, weight).mean_norms_of(
        *map(pointer, (value, strides, weight, counts)),
        *sizes(*_sizes(value, weight, in_out, heads, quadratic), quadratic),
        pointer(out),
    )
    return out


def select_bounded(
    base: Tensor,
    value: Tensor,
    weight: Tensor,
    in_out: bool,
    heads: int,
    root: Tensor,
    budget: int,
    window_size: int,
    ratio: list[int],
    epsilon: float,
    real: Tensor | None,
    row_budgets: Tensor | None,
) -> tuple[Tensor, int]:
    """What a selection by ``(base + epsilon) * ||v W||_1`` keeps, and of how many it made norms.

    Args:
        root: ``R`` of each head, ``[H*Dv, Dv]`` float32, with ``R^T R = W W^T``.
        budget: below K.

    Returns:
        ``[B, Hkv, budget]`` int64, as :func:`ckv_compile.kernels.select.select`.
    """
    depth, strides = value.shape[3], torch.tensor(value.stride(), device="cpu")
    # What float32 sums can lose of ||R v|| and ||v W||, and of R when it is made of E columns (from
    # measured errors, with room); of the largest number in v, for ||v|| <= sqrt(Dv) times that.
    width = weight.shape[1 if in_out else 0]
    rounding = depth**0.5 * (4 * depth + width / 16) * torch.finfo(torch.float32).eps
    # In float64, where squares of tiny numbers are none.
    size = torch.linalg.vector_norm(root.view(heads, -1), dim=1, dtype=torch.float64)
    lost = (size * rounding).float()
    operands = [
        None if x is None else x.contiguous() for x in (root, lost, base, real, row_budgets)
    ]
    out = base.new_empty((*base.shape[:2], budget), dtype=torch.int64)
    run = _library(value, weight).select_bounded_by
    run.restype = ctypes.c_int64
    made = run(
        *map(pointer, (value, strides, weight, *operands)),
        *sizes(*_sizes(value, weight, in_out, heads), budget, window_size, *ratio),
        ctypes.c_float(epsilon),
        pointer(out),
    )
    return out, made


def _sizes(
    value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool = False
) -> tuple[int, ...]:
    """Strides and width of the weight, lengths of the value, threads: what both functions take."""
    batch, kv_heads, kv_len, depth = value.shape
    stride_d, stride_e = weight.stride() if in_out else weight.stride()[::-1]
    stride_h = depth * stride_d
    if quadratic:  # by rows
        stride_d, stride_e = stride_e, stride_d
    lengths = (batch, kv_heads, heads // kv_heads, kv_len, depth)
    width = weight.shape[1 if in_out else 0]
    return stride_h, stride_d, stride_e, width, *lengths, torch.get_num_threads()
