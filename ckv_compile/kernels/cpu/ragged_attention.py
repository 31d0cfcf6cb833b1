"""Attention of few queries over heads of different lengths: C++, compiled once by Inductor's tools.

A loop of library calls over heads leaves most of the memory bandwidth unused, and padding the heads
to one length reads what is not there. Here the work is cut into chunks of keys, whatever head they
belong to, so that all threads have the same to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, library, pointer, sizes

# More query rows than this, and a matrix product is faster than these dot products.
MOST_ROWS = 32

_SOURCE = (
    PRELUDE
    + r"""
// exp(x) for x <= 0, to about 2 ulp, without a call that would keep the loop from being vectorised:
// 2^n times a polynomial of the rest (Cephes' coefficients).
inline float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  float n = std::floor(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

constexpr int64_t CHUNK = 256;

// An entry as floats: itself, or its values converted into room for them.
inline const float* floats(const float* entry, int64_t, float*) { return entry; }
template <typename scalar>
const float* floats(const scalar* entry, int64_t size, float* room) {
  for (int64_t d = 0; d < size; ++d) room[d] = as_float(entry[d]);
  return room;
}

// Four queries at a time: each number of a key is then loaded once for all of them.
inline void products(const float* query, const float* key, int64_t rows, int64_t head_dim,
                     float* logits) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float *a = query + r * head_dim, *b = a + head_dim, *c = b + head_dim, *e = c + head_dim;
    float s = 0.0f, t = 0.0f, u = 0.0f, v = 0.0f;
    #pragma omp simd reduction(+ : s, t, u, v)
    for (int64_t d = 0; d < head_dim; ++d) {
      s += a[d] * key[d];
      t += b[d] * key[d];
      u += c[d] * key[d];
      v += e[d] * key[d];
    }
    logits[r * CHUNK] = s;
    logits[(r + 1) * CHUNK] = t;
    logits[(r + 2) * CHUNK] = u;
    logits[(r + 3) * CHUNK] = v;
  }
  for (; r < rows; ++r) {
    const float* a = query + r * head_dim;
    float s = 0.0f;
    #pragma omp simd reduction(+ : s)
    for (int64_t d = 0; d < head_dim; ++d) s += a[d] * key[d];
    logits[r * CHUNK] = s;
  }
}

// Four values at a time, so that the sum is loaded and stored once for all of them.
template <typename scalar>
void add_values(const float* weights, const scalar* value, int64_t length, int64_t rows,
                int64_t value_dim, float* room, float* out) {
  int64_t j = 0;
  for (; j + 4 <= length; j += 4) {
    const float* v[4];
    for (int64_t i = 0; i < 4; ++i)
      v[i] = floats(value + (j + i) * value_dim, value_dim, room + i * value_dim);
    const float *a = v[0], *b = v[1], *c = v[2], *e = v[3];
    for (int64_t r = 0; r < rows; ++r) {
      const float* w = weights + r * CHUNK + j;
      const float s = w[0], t = w[1], u = w[2], x = w[3];
      float* o = out + r * value_dim;
      #pragma omp simd
      for (int64_t d = 0; d < value_dim; ++d) o[d] += (s * a[d] + t * b[d]) + (u * c[d] + x * e[d]);
    }
  }
  for (; j < length; ++j) {
    const float* v = floats(value + j * value_dim, value_dim, room);
    for (int64_t r = 0; r < rows; ++r) {
      const float w = weights[r * CHUNK + j];
      float* o = out + r * value_dim;
      #pragma omp simd
      for (int64_t d = 0; d < value_dim; ++d) o[d] += w * v[d];
    }
  }
}

// One chunk of keys of one head: the largest logit, the sum of weights and the weighted values of
// every query row.
template <typename scalar>
void attend(const float* query, const scalar* key, const scalar* value, int64_t length,
            int64_t rows, int64_t head_dim, int64_t value_dim, float* largest, float* sum,
            float* out) {
  std::vector<float> logits(rows * CHUNK), room(4 * std::max(head_dim, value_dim));
  for (int64_t j = 0; j < length; ++j)
    products(query, floats(key + j * head_dim, head_dim, room.data()), rows, head_dim,
             logits.data() + j);
  for (int64_t r = 0; r < rows; ++r) {
    float* weights = logits.data() + r * CHUNK;
    float most = -INFINITY, total = 0.0f;
    #pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < length; ++j) most = most < weights[j] ? weights[j] : most;
    #pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < length; ++j) {
      weights[j] = exp_of_negative(weights[j] - most);
      total += weights[j];
    }
    largest[r] = most;
    sum[r] = total;
  }
  std::fill(out, out + rows * value_dim, 0.0f);
  add_values(logits.data(), value, length, rows, value_dim, room.data(), out);
}

template <typename scalar>
void ragged(const float* query, const scalar* key, const scalar* value, const int32_t* cu_kv_lens,
            int64_t heads, int64_t rows, int64_t head_dim, int64_t value_dim, int64_t threads,
            float* out, float* lse) {
  std::vector<int64_t> chunks(heads + 1, 0);
  for (int64_t h = 0; h < heads; ++h)
    chunks[h + 1] = chunks[h] + (cu_kv_lens[h + 1] - cu_kv_lens[h] + CHUNK - 1) / CHUNK;
  const int64_t total = chunks[heads];
  std::vector<float> largest(total * rows), sums(total * rows), parts(total * rows * value_dim);
  #pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t c = 0; c < total; ++c) {
    int64_t h = std::upper_bound(chunks.begin(), chunks.end(), c) - chunks.begin() - 1;
    int64_t start = cu_kv_lens[h] + (c - chunks[h]) * CHUNK;
    int64_t length = std::min<int64_t>(cu_kv_lens[h + 1] - start, CHUNK);
    attend(query + h * rows * head_dim, key + start * head_dim, value + start * value_dim, length,
           rows, head_dim, value_dim, &largest[c * rows], &sums[c * rows],
           &parts[c * rows * value_dim]);
  }
  #pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < heads * rows; ++i) {
    int64_t h = i / rows, r = i % rows;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t c = chunks[h]; c < chunks[h + 1]; ++c)
      most = std::max(most, largest[c * rows + r]);
    float* o = out + i * value_dim;
    std::fill(o, o + value_dim, 0.0f);
    for (int64_t c = chunks[h]; c < chunks[h + 1]; ++c) {
      float weight = exp_of_negative(largest[c * rows + r] - most);
      const float* part = &parts[(c * rows + r) * value_dim];
      sum += weight * sums[c * rows + r];
      for (int64_t d = 0; d < value_dim; ++d) o[d] += weight * part[d];
    }
    const bool empty = chunks[h] == chunks[h + 1];
    if (!empty)
      for (int64_t d = 0; d < value_dim; ++d) o[d] /= sum;
    lse[i] = empty ? -INFINITY : most + std::log(sum);
  }
}

}  // namespace

#define EXPORT(scalar)                                                                            \
  extern "C" void ragged_##scalar(                                                                \
      const float* query, const void* key, const void* value, const int32_t* cu_kv_lens,          \
      int64_t heads, int64_t rows, int64_t head_dim, int64_t value_dim, int64_t threads,          \
      float* out, float* lse) {                                                                   \
    ragged(query, static_cast<const scalar*>(key), static_cast<const scalar*>(value), cu_kv_lens, \
           heads, rows, head_dim, value_dim, threads, out, lse);                                  \
  }
EXPORT(float)
EXPORT(bfloat16)
EXPORT(half)
"""
)


def _library() -> Any:
    return library(_SOURCE, "the ragged attention kernel, which then loops over heads")


def takes(key: Tensor, rows: int) -> bool:
    """Whether the kernel is for these operands."""
    return rows <= MOST_ROWS and key.dtype in SUFFIX and _library() is not None


def attend(query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of ``rows`` queries per head over that head's entries.

    Args:
        query: ``[heads, rows, D]`` float32, times the scale.
        key, value: ``[T, D]`` and ``[T, Dv]``, float32, bfloat16 or float16.
        cu_kv_lens: ``[heads + 1]`` int32, where each head's entries begin and the last ones end.

    Returns:
        ``[heads, rows, Dv]`` float32, zeros for a head without entries, and the log-sum-exp of the
        logits, ``[heads, rows]`` float32, then ``-inf``.
    """
    heads, rows, head_dim = query.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cu_kv_lens = cu_kv_lens.contiguous()
    out = query.new_empty(heads, rows, value.shape[1])
    lse = query.new_empty(heads, rows)
    run = getattr(_library(), f"ragged_{SUFFIX[key.dtype]}")
    run(
        *map(pointer, (query, key, value, cu_kv_lens)),
        *sizes(heads, rows, head_dim, value.shape[1], torch.get_num_threads()),
        *map(pointer, (out, lse)),
    )
    return out, lse
