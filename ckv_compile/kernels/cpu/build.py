"""C++ of ours, compiled once by Inductor's tools and kept in its cache."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("ckv_compile")

# The element types that the kernels read; they compute in float32.
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}

PRELUDE = r"""
// GCC takes half of each register by default, for clocks that dropped on old processors.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

struct bfloat16 { uint16_t bits; };
using half = _Float16;

inline float as_float(float x) { return x; }
inline float as_float(half x) { return static_cast<float>(x); }
inline float as_float(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
"""

# A product of matrices as tiles that stay in registers, for what follows it to be done there.
TILES = r"""
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 12;
#else
constexpr int64_t LANES = 8, ROWS = 6;
#endif
constexpr int64_t COLUMNS = 2 * LANES;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* from) {
  vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(value)); }

// By halves: in order, each addition would wait for the one before.
inline float sum_of(vec value) {
  float parts[LANES];
  store(parts, value);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

#if defined(__AVX512F__)
inline vec even_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline vec odd_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
inline vec even_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
inline vec odd_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#endif

// The sum of each of LANES vectors, in its lane.
inline vec sums_of(vec (&v)[LANES]) {
  for (int64_t count = LANES / 2; count; count /= 2)
    for (int64_t i = 0; i < count; ++i)
      v[i] = even_lanes(v[2 * i], v[2 * i + 1]) + odd_lanes(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Rows [ROWS][depth] times a panel [depth][COLUMNS]. Not inline: among other values GCC keeps some
// of the sums in memory.
[[maybe_unused, gnu::noinline]] void multiply(const float* rows, const float* panel,
                                              int64_t depth, vec (&out)[ROWS][2]) {
  vec sums[ROWS][2] = {};  // not `out`, which might be what `rows` points to
  for (int64_t d = 0; d < depth; ++d) {
    const vec left = load(panel + d * COLUMNS), right = load(panel + d * COLUMNS + LANES);
    #pragma GCC unroll 12
    for (int64_t r = 0; r < ROWS; ++r) {
      const float x = rows[r * depth + d];
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
  }
  std::memcpy(out, sums, sizeof(out));
}

// ROWS rows [depth] as floats, one behind the other; those behind `some` are zero.
template <typename scalar>
void copy_rows(const scalar* from, int64_t stride_row, int64_t stride_d, int64_t some,
               int64_t depth, float* room) {
  for (int64_t r = 0; r < some; ++r, room += depth) {
    const scalar* row = from + r * stride_row;
    if (stride_d == 1)  // its own loop, which is vectorised
      for (int64_t d = 0; d < depth; ++d) room[d] = as_float(row[d]);
    else
      for (int64_t d = 0; d < depth; ++d) room[d] = as_float(row[d * stride_d]);
  }
  std::fill_n(room, (ROWS - some) * depth, 0.0f);
}

// exp(x) for x <= 0, to about 2 ulp: 2^n times a polynomial of the rest (Cephes' coefficients).
inline vec exp_of_negative(vec x) {
  const vec y = x < -87.0f ? vec{} - 87.0f : x;
  const ivec n = __builtin_convertvector(y * 1.44269504088896341f - 0.5f, ivec);
  const vec whole = __builtin_convertvector(n, vec);
  const vec r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec bits = (n + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? vec{} : p * scale;
}
"""


@functools.cache
def library(source: str, what: str) -> Any:
    """The compiled ``source``; None, said in the log once for each, where no compiler takes it.

    Args:
        what: the kernel, and what is done in its place, for people.
    """
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache

    try:
        # Inductor's own flags are for code that it has vectorised itself, and let the compiler
        # assume infinities away, which are values here. Not -funsafe-math-optimizations, which is
        # these: with that GCC links a start-up that flushes tiny numbers to zero, in all code. Nor
        # -fassociative-math: equal entries whose sums were added in two orders would differ.
        flags = (
            "-ftree-vectorize", "-ftree-loop-vectorize", "-fno-signed-zeros", "-fno-trapping-math",
            "-ffp-contract=fast", "-fno-math-errno", "-fno-finite-math-only",
        )  # fmt: skip
        return CppCodeCache.load_async(source, extra_flags=flags, needs_vec_isa=True)()
    except (exc.CppCompileError, exc.InvalidCxxCompiler, OSError) as error:
        log.warning("no C++ compiler for %s: %s", what, str(error).splitlines()[0])
        return None


@functools.cache
def source_for(source: str, **dtypes: torch.dtype) -> str:
    """The source for these element types: nobody waits for those that a model does not have.

    Kept, so that a call finds its library by the string itself.

    Args:
        dtypes: the type that stands for each upper-case name in the source.
    """
    for name, dtype in dtypes.items():
        source = source.replace(name, SUFFIX[dtype])
    return source


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """To the tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sizes(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    """Numbers as the kernels take them."""
    return tuple(map(ctypes.c_int64, numbers))
