"""Attention of few queries, a decode step's: C++, compiled once by Inductor's tools.

PyTorch's kernel gives whole heads to threads and is made for many queries: with one query a head it
reads the cache at a third of a copy's speed, and few KV heads leave processors idle. For heads of
different lengths there is none: a loop of library calls leaves most of the memory bandwidth unused,
and padding the heads to one length reads what is not there. Here the work is cut into chunks of
keys, whatever head they belong to, so that all threads have the same to do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .build import PRELUDE, SUFFIX, TILES, library, pointer, sizes, source_for

# More query rows than these, and a library's matrix products are faster than these dot products:
# than a loop of them over heads, and than PyTorch's attention.
MOST_ROWS, MOST_ROWS_DENSE = 32, 8

_SOURCE = (
    PRELUDE
    + TILES
    + r"""
using scalar = SCALAR;
constexpr int64_t CHUNK = 256;
// Keys or values that are read as floats at a time.
constexpr int64_t BLOCK = LANES;
static_assert(CHUNK % BLOCK == 0, "a chunk is whole blocks");

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// The sizes that all heads share; an entry's key and value stand a stride behind the last ones.
struct Shape {
  int64_t rows, head_dim, value_dim, key_stride, value_stride;
};

// Where a head's entries begin, how many there are, and what is added to the logits of its rows.
struct Head {
  int64_t key, value, length, mask;
};

// Float masks as SDPA takes them: the keys behind each other, rows `stride` apart, null for none.
struct Mask {
  const float* data;
  int64_t stride;
};

// `count` entries as floats, `*stride` apart: in place, or copied to `room` [BLOCK][padded(size)].
const float* block_of(const scalar* from, int64_t from_stride, int64_t count, int64_t size,
                      float* room, int64_t* stride) {
  *stride = padded(size);
  if (std::is_same<scalar, float>::value && count == BLOCK && size == *stride) {
    *stride = from_stride;
    return reinterpret_cast<const float*>(from);
  }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < size; ++d) room[j * *stride + d] = as_float(from[j * from_stride + d]);
  return room;
}

// Logits of some queries [some][size] on a block of keys: as many products as there are lanes.
template <int64_t some>
void products(const float* query, int64_t size, const float* key, int64_t stride, int64_t count,
              float* logits) {
  // Three rows take the lanes of four.
  constexpr int64_t KEYS = LANES / (some == 3 ? 4 : some);
  for (int64_t j = 0; j < count; j += KEYS) {
    vec sums[LANES] = {};
    for (int64_t d = 0; d < size; d += LANES) {
      vec q[some];
      #pragma GCC unroll 4
      for (int64_t r = 0; r < some; ++r) q[r] = load(query + r * size + d);
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

// Adds the weighted values of a block to `width` vectors of each sum [some][size].
template <int64_t some, int64_t width>
void add_values(const float* weights, const float* value, int64_t stride, int64_t count,
                float* out, int64_t size) {
  vec sums[some][width];
  for (int64_t r = 0; r < some; ++r)
    for (int64_t t = 0; t < width; ++t) sums[r][t] = load(out + r * size + t * LANES);
  for (int64_t j = 0; j < count; ++j) {
    #pragma GCC unroll 4
    for (int64_t t = 0; t < width; ++t) {
      const vec x = load(value + j * stride + t * LANES);
      #pragma GCC unroll 4
      for (int64_t r = 0; r < some; ++r) sums[r][t] += weights[r * CHUNK + j] * x;
    }
  }
  for (int64_t r = 0; r < some; ++r)
    for (int64_t t = 0; t < width; ++t) store(out + r * size + t * LANES, sums[r][t]);
}

template <int64_t some>
void add_block(const float* weights, const float* value, int64_t stride, int64_t count,
               float* out, int64_t size) {
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
    add_values<some, 4>(weights, value + d, stride, count, out + d, size);
  for (; d < size; d += LANES)
    add_values<some, 1>(weights, value + d, stride, count, out + d, size);
}

// Calls f with the number of rows, a constant, and the first of them: by fours, then what is left.
template <typename function>
void by_rows(int64_t rows, const function& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int64_t, 4>(), r);
  if (rows - r == 3) f(std::integral_constant<int64_t, 3>(), r);
  if (rows - r == 2) f(std::integral_constant<int64_t, 2>(), r);
  if (rows - r == 1) f(std::integral_constant<int64_t, 1>(), r);
}

// Calls f(some, row, block, stride, j, count) for all rows and blocks of entries: those from j on.
template <typename function>
void by_blocks(const scalar* from, int64_t from_stride, int64_t length, int64_t size, int64_t rows,
               std::vector<float>& room, const function& f) {
  // What stands behind an entry, or behind the last one, is multiplied too.
  std::fill(room.begin(), room.end(), 0.0f);
  int64_t stride;
  for (int64_t j = 0; j < length; j += BLOCK) {
    const int64_t count = std::min(BLOCK, length - j);
    const float* block =
        block_of(from + j * from_stride, from_stride, count, size, room.data(), &stride);
    by_rows(rows, [&](auto some, int64_t r) { f(some, r, block, stride, j, count); });
  }
}

// What is subtracted from logits: where a mask hides all of them, the weights are zero, not NaN.
inline float finite_or_zero(float largest) { return largest > -INFINITY ? largest : 0.0f; }

// What a thread needs for the chunks that it works on.
struct Room {
  std::vector<float> query, logits, block, sums;
  explicit Room(const Shape& shape)
      : query(shape.rows * padded(shape.head_dim)), logits(shape.rows * CHUNK),
        block(BLOCK * padded(std::max(shape.head_dim, shape.value_dim))),
        sums(shape.rows * padded(shape.value_dim)) {}
};

// One chunk of keys of one head: the largest logit, the sum of weights and the weighted values of
// every query row.
void attend(const float* query, const scalar* key, const scalar* value, int64_t length,
            const Shape& shape, Mask mask, Room& room, float* largest, float* sum, float* out) {
  const int64_t rows = shape.rows, width = padded(shape.head_dim);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(query + r * shape.head_dim, shape.head_dim, &room.query[r * width]);
  by_blocks(key, shape.key_stride, length, shape.head_dim, rows, room.block,
            [&](auto some, int64_t r, const float* keys, int64_t stride, int64_t j, int64_t count) {
    products<some()>(&room.query[r * width], width, keys, stride, count,
                     &room.logits[r * CHUNK + j]);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* weights = &room.logits[r * CHUNK];
    if (mask.data)
      for (int64_t j = 0; j < length; ++j) weights[j] += mask.data[r * mask.stride + j];
    std::fill(weights + length, weights + padded(length), -INFINITY);
    vec most = load(weights), total = {};
    for (int64_t j = LANES; j < length; j += LANES) {
      const vec x = load(weights + j);
      most = x > most ? x : most;
    }
    float lanes[LANES];
    store(lanes, most);
    largest[r] = *std::max_element(lanes, lanes + LANES);
    const float base = finite_or_zero(largest[r]);
    for (int64_t j = 0; j < length; j += LANES) {
      const vec weight = exp_of_negative(load(weights + j) - base);
      store(weights + j, weight);
      total += weight;
    }
    sum[r] = sum_of(total);
  }
  const int64_t out_width = padded(shape.value_dim);
  std::fill(room.sums.begin(), room.sums.end(), 0.0f);
  by_blocks(value, shape.value_stride, length, shape.value_dim, rows, room.block,
            [&](auto some, int64_t r, const float* values, int64_t stride, int64_t j,
                int64_t count) {
    add_block<some()>(&room.logits[r * CHUNK + j], values, stride, count,
                      &room.sums[r * out_width], out_width);
  });
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(&room.sums[r * out_width], shape.value_dim, out + r * shape.value_dim);
}

// Attention of the rows [rows][head_dim] of each head, times the scale; `lse` is null or
// [heads][rows].
void attention(const float* query, const scalar* key, const scalar* value,
               const std::vector<Head>& heads, const Shape& shape, Mask mask, int64_t threads,
               float* out, float* lse) {
  const int64_t rows = shape.rows, value_dim = shape.value_dim, count = heads.size();
  int64_t entries = 0;
  for (const Head& head : heads) entries += head.length;
  // Chunks of one size: where there are few, each thread should still find some.
  const int64_t even = (entries + 4 * threads - 1) / (4 * threads);
  const int64_t chunk = std::min(std::max(padded(even), 4 * BLOCK), CHUNK);
  std::vector<int64_t> chunks(count + 1, 0);
  for (int64_t h = 0; h < count; ++h)
    chunks[h + 1] = chunks[h] + (heads[h].length + chunk - 1) / chunk;
  const int64_t total = chunks[count];
  std::vector<float> largest(total * rows), sums(total * rows), parts(total * rows * value_dim);
  #pragma omp parallel num_threads(std::max<int64_t>(std::min(threads, total), 1))
  {
    Room room(shape);
    #pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < total; ++c) {
      const int64_t h = std::upper_bound(chunks.begin(), chunks.end(), c) - chunks.begin() - 1;
      const int64_t start = (c - chunks[h]) * chunk;
      const Head& head = heads[h];
      const float* added = mask.data ? mask.data + head.mask + start : nullptr;
      attend(query + h * rows * shape.head_dim, key + head.key + start * shape.key_stride,
             value + head.value + start * shape.value_stride,
             std::min(head.length - start, chunk), shape, {added, mask.stride}, room,
             &largest[c * rows], &sums[c * rows], &parts[c * rows * value_dim]);
    }
  }
  #pragma omp parallel for num_threads(threads) if (total * rows * value_dim > 65536)
  for (int64_t i = 0; i < count * rows; ++i) {
    const int64_t h = i / rows, r = i % rows;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t c = chunks[h]; c < chunks[h + 1]; ++c)
      most = std::max(most, largest[c * rows + r]);
    const float base = finite_or_zero(most);
    float* o = out + i * value_dim;
    std::fill(o, o + value_dim, 0.0f);
    for (int64_t c = chunks[h]; c < chunks[h + 1]; ++c) {
      const float weight = std::exp(largest[c * rows + r] - base);
      const float* part = &parts[(c * rows + r) * value_dim];
      sum += weight * sums[c * rows + r];
      for (int64_t d = 0; d < value_dim; ++d) o[d] += weight * part[d];
    }
    if (sum != 0.0f)
      for (int64_t d = 0; d < value_dim; ++d) o[d] /= sum;
    if (lse) lse[i] = sum == 0.0f ? -INFINITY : base + std::log(sum);
  }
}

// Heads of one length, as tensors have them; strides in elements.
struct Dense {
  int64_t batch, heads, rows, length, head_dim, value_dim;
  int64_t key_batch, key_head, key_entry, value_batch, value_head, value_entry;
  int64_t mask_batch, mask_head, mask_row, threads;
};

}  // namespace

extern "C" void attend_packed(const float* query, const scalar* key, const scalar* value,
                              const int32_t* cu_kv_lens, int64_t count, int64_t rows,
                              int64_t head_dim, int64_t value_dim, int64_t threads, float* out,
                              float* lse) {
  std::vector<Head> heads(count);
  for (int64_t h = 0; h < count; ++h) {
    const int64_t start = cu_kv_lens[h], end = cu_kv_lens[h + 1];
    heads[h] = {start * head_dim, start * value_dim, end - start, 0};
  }
  const Shape shape = {rows, head_dim, value_dim, head_dim, value_dim};
  attention(query, key, value, heads, shape, {nullptr, 0}, threads, out, lse);
}

extern "C" void attend_dense(const scalar* query, double scale, const scalar* key,
                             const scalar* value, const float* mask, const Dense* sizes,
                             float* out) {
  const Dense& n = *sizes;
  const float factor = scale;
  std::vector<Head> heads(n.batch * n.heads);
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t h = 0; h < n.heads; ++h)
      heads[b * n.heads + h] = {b * n.key_batch + h * n.key_head,
                                b * n.value_batch + h * n.value_head, n.length,
                                b * n.mask_batch + h * n.mask_head};
  const Shape shape = {n.rows, n.head_dim, n.value_dim, n.key_entry, n.value_entry};
  std::vector<float> scaled(heads.size() * n.rows * n.head_dim);
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] = as_float(query[i]) * factor;
  attention(scaled.data(), key, value, heads, shape, {mask, n.mask_row}, n.threads, out, nullptr);
}
"""
)


def _library(dtype: torch.dtype) -> Any:
    source = source_for(_SOURCE, SCALAR=dtype)
    return library(source, "attention of few queries, which is then made by library calls")


def takes(key: Tensor, rows: int) -> bool:
    """Whether :func:`attend_packed` is for these operands."""
    return rows <= MOST_ROWS and key.dtype in SUFFIX and _library(key.dtype) is not None


def takes_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`attend_dense` is for these operands, and the mask once it is float32."""
    plain = query.dtype == key.dtype == value.dtype and key.stride(3) == 1 == value.stride(3)
    if mask is not None:
        plain &= mask.is_floating_point() and mask.stride(-1) == 1
        plain &= mask.shape[-1] == key.shape[2]
    return plain and key.dtype in SUFFIX and _library(key.dtype) is not None


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, cu_kv_lens: Tensor
) -> tuple[Tensor, Tensor]:
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
    _library(key.dtype).attend_packed(
        *map(pointer, (query, key, value, cu_kv_lens)),
        *sizes(heads, rows, head_dim, value.shape[1], torch.get_num_threads()),
        *map(pointer, (out, lse)),
    )
    return out, lse


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of ``rows`` queries per head over as many entries in each.

    Args:
        query: ``[B, H, rows, D]``, in the keys' dtype.
        key, value: ``[B, H, K, D]`` and ``[B, H, K, Dv]``, float32, bfloat16 or float16, the last
            dimension contiguous.
        mask: added to the logits, float32, broadcasts to ``[B, H, rows, K]``, the last dimension
            K and contiguous.
        scale: of the logits.

    Returns:
        ``[B, H, rows, Dv]`` float32, contiguous; zeros where the mask hides everything.
    """
    batch, heads, rows, head_dim = query.shape
    kv_len, value_dim = value.shape[2:]
    query = query.contiguous()
    out = query.new_empty((batch, heads, rows, value_dim), dtype=torch.float32)
    seen = (0, 0, 0)
    if mask is not None:
        seen = mask.expand(batch, heads, rows, kv_len).stride()[:3]
    numbers = (batch, heads, rows, kv_len, head_dim, value_dim)
    strides = (*key.stride()[:3], *value.stride()[:3], *seen)
    _library(key.dtype).attend_dense(
        pointer(query),
        ctypes.c_double(scale),
        *map(pointer, (key, value, mask)),
        (ctypes.c_int64 * 16)(*numbers, *strides, torch.get_num_threads()),  # Dense
        pointer(out),
    )
    return out
