"""Attention of few queries over heads of different lengths: C++, compiled once by Inductor's tools.

A loop of library calls over heads leaves most of the memory bandwidth unused, and padding the heads
to one length reads what is not there. Here the work is cut into chunks of keys, whatever head they
belong to, so that all threads have the same to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes

# More query rows than this, and a matrix product is faster than these dot products.
MOST_ROWS = 32

_SOURCE = (
    PRELUDE
    + TILES
    + r"""
constexpr int64_t CHUNK = 256;
// Keys or values that are read as floats at a time.
constexpr int64_t BLOCK = LANES;
static_assert(CHUNK % BLOCK == 0, "a chunk is whole blocks");

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// `count` entries as floats, `stride` apart: in place, or copied to `room` [BLOCK][padded(size)].
template <typename scalar>
const float* block_of(const scalar* from, int64_t count, int64_t size, float* room,
                      int64_t* stride) {
  *stride = padded(size);
  if (std::is_same<scalar, float>::value && count == BLOCK && size == *stride)
    return reinterpret_cast<const float*>(from);
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < size; ++d) room[j * *stride + d] = as_float(from[j * size + d]);
  return room;
}

// Logits of some queries [some][stride] on a block of keys: as many products as there are lanes.
template <int64_t some>
void products(const float* query, const float* key, int64_t stride, int64_t count, float* logits) {
  constexpr int64_t KEYS = LANES / some;
  for (int64_t j = 0; j < count; j += KEYS) {
    vec sums[LANES] = {};
    for (int64_t d = 0; d < stride; d += LANES) {
      vec q[some];
      #pragma GCC unroll 4
      for (int64_t r = 0; r < some; ++r) q[r] = load(query + r * stride + d);
      #pragma GCC unroll 16
      for (int64_t k = 0; k < KEYS; ++k) {
        const vec x = load(key + (j + k) * stride + d);
        #pragma GCC unroll 4
        for (int64_t r = 0; r < some; ++r) sums[r * KEYS + k] += q[r] * x;
      }
    }
    float found[LANES];
    store(found, sums_of(sums));
    for (int64_t r = 0; r < some; ++r)
      std::copy_n(found + r * KEYS, std::min(KEYS, count - j), logits + r * CHUNK + j);
  }
}

// Adds the weighted values of a block to `width` vectors of each sum.
template <int64_t some, int64_t width>
void add_values(const float* weights, const float* value, int64_t stride, int64_t count,
                float* out) {
  vec sums[some][width];
  for (int64_t r = 0; r < some; ++r)
    for (int64_t t = 0; t < width; ++t) sums[r][t] = load(out + r * stride + t * LANES);
  for (int64_t j = 0; j < count; ++j) {
    #pragma GCC unroll 4
    for (int64_t t = 0; t < width; ++t) {
      const vec x = load(value + j * stride + t * LANES);
      #pragma GCC unroll 4
      for (int64_t r = 0; r < some; ++r) sums[r][t] += weights[r * CHUNK + j] * x;
    }
  }
  for (int64_t r = 0; r < some; ++r)
    for (int64_t t = 0; t < width; ++t) store(out + r * stride + t * LANES, sums[r][t]);
}

template <int64_t some>
void add_block(const float* weights, const float* value, int64_t stride, int64_t count,
               float* out) {
  int64_t d = 0;
  for (; d + 4 * LANES <= stride; d += 4 * LANES)
    add_values<some, 4>(weights, value + d, stride, count, out + d);
  for (; d < stride; d += LANES)
    add_values<some, 1>(weights, value + d, stride, count, out + d);
}

// Calls f with the number of rows, a constant, and the first of them: by fours, twos and ones.
template <typename function>
void by_rows(int64_t rows, const function& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int64_t, 4>(), r);
  for (; r + 2 <= rows; r += 2) f(std::integral_constant<int64_t, 2>(), r);
  for (; r < rows; ++r) f(std::integral_constant<int64_t, 1>(), r);
}

// What a thread needs for the chunks that it works on.
struct Room {
  std::vector<float> query, logits, block, sums;
  Room(int64_t rows, int64_t head_dim, int64_t value_dim)
      : query(rows * padded(head_dim)), logits(rows * CHUNK),
        block(BLOCK * padded(std::max(head_dim, value_dim))), sums(rows * padded(value_dim)) {}
};

// One chunk of keys of one head: the largest logit, the sum of weights and the weighted values of
// every query row.
template <typename scalar>
void attend(const float* query, const scalar* key, const scalar* value, int64_t length,
            int64_t rows, int64_t head_dim, int64_t value_dim, Room& room, float* largest,
            float* sum, float* out) {
  int64_t stride = padded(head_dim);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(query + r * head_dim, head_dim, &room.query[r * stride]);
  // What stands behind an entry, or behind the last one, is multiplied too.
  std::fill(room.block.begin(), room.block.end(), 0.0f);
  for (int64_t j = 0; j < length; j += BLOCK) {
    const int64_t count = std::min(BLOCK, length - j);
    const float* keys = block_of(key + j * head_dim, count, head_dim, room.block.data(), &stride);
    by_rows(rows, [&](auto some, int64_t r) {
      products<some()>(&room.query[r * stride], keys, stride, count, &room.logits[r * CHUNK + j]);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* weights = &room.logits[r * CHUNK];
    std::fill(weights + length, weights + padded(length), -INFINITY);
    vec most = load(weights), total = {};
    for (int64_t j = LANES; j < length; j += LANES) {
      const vec x = load(weights + j);
      most = x > most ? x : most;
    }
    float lanes[LANES];
    store(lanes, most);
    largest[r] = *std::max_element(lanes, lanes + LANES);
    for (int64_t j = 0; j < length; j += LANES) {
      const vec weight = exp_of_negative(load(weights + j) - largest[r]);
      store(weights + j, weight);
      total += weight;
    }
    sum[r] = sum_of(total);
  }
  stride = padded(value_dim);
  std::fill(room.block.begin(), room.block.end(), 0.0f);
  std::fill(room.sums.begin(), room.sums.end(), 0.0f);
  for (int64_t j = 0; j < length; j += BLOCK) {
    const int64_t count = std::min(BLOCK, length - j);
    const float* values =
        block_of(value + j * value_dim, count, value_dim, room.block.data(), &stride);
    by_rows(rows, [&](auto some, int64_t r) {
      add_block<some()>(&room.logits[r * CHUNK + j], values, stride, count, &room.sums[r * stride]);
    });
  }
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(&room.sums[r * stride], value_dim, out + r * value_dim);
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
  #pragma omp parallel num_threads(threads)
  {
    Room room(rows, head_dim, value_dim);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < total; ++c) {
      int64_t h = std::upper_bound(chunks.begin(), chunks.end(), c) - chunks.begin() - 1;
      int64_t start = cu_kv_lens[h] + (c - chunks[h]) * CHUNK;
      int64_t length = std::min<int64_t>(cu_kv_lens[h + 1] - start, CHUNK);
      attend(query + h * rows * head_dim, key + start * head_dim, value + start * value_dim,
             length, rows, head_dim, value_dim, room, &largest[c * rows], &sums[c * rows],
             &parts[c * rows * value_dim]);
    }
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
      float weight = std::exp(largest[c * rows + r] - most);
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
