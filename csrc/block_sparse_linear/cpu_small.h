// block_sparse_linear for 1 to 4 rows of x: at the speed of memory, straight from the stored
// values.
//
// Lanes run along k, as the values lie. Every row of a block row has a vector of partial sums in
// L1; up to four neighbouring blocks are read side by side, because one stream does not fill this
// kind of CPU's memory pipes, and a row's sums are loaded and stored once for all of them. Per 64
// bytes of float32 values that is one load of values, one of x and an FMA: 64 B a cycle, several
// times what memory delivers, and half of it for bfloat16. The lanes are added up once a block row:
// 45 instructions for 16 rows.
#pragma once

#include "cpu_product.h"

namespace nibblock {
namespace {

constexpr int64_t kSmallRows = 4;
constexpr int64_t kAheadBytes =
    8 << 10;  // values fetched ahead, across the pages that hardware stops at

// x as [column block][MR][B], zeros behind its last column and in rows that do not exist.
template <class O, int B>
static void pack_small(const Walk& w, const void* x, Dtype type, int64_t stride, int64_t rows,
                       int64_t slots, float* out) {
  with_type(type, [&](auto tag, int size) {
    for (int64_t j = 0; j < w.ins; ++j) {
      if (w.used[j] == w.used[j + 1]) continue;
      const int64_t count = min64(B, w.in_size - j * B);
      for (int64_t r = 0; r < slots; ++r) {
        float* to = out + (j * slots + r) * B;
        if (count < B || r >= rows) memset(to, 0, B * sizeof(float));
        if (r >= rows) continue;
        widen<O>(tag, size, static_cast<const char*>(x) + (r * stride + j * B) * size, count, to);
      }
    }
  });
}

// Adds G neighbouring blocks to the partial sums of rows [i0, i1): acc[i - i0][m][lanes].
template <class O, int B, int MR, int G, class T>
NB_INLINE void small_blocks(T type, int size, const char* values, const int32_t* in, const float* x,
                            int64_t i0, int64_t i1, float* acc) {
  const float* xs[G];
  NB_UNROLL
  for (int g = 0; g < G; ++g) xs[g] = x + in[g] * MR * B;
  for (int64_t i = i0; i < i1; ++i, acc += MR * O::kLanes) {
    typename O::F sum[MR];
    NB_UNROLL
    for (int m = 0; m < MR; ++m) sum[m] = O::loadf(acc + m * O::kLanes);
    NB_UNROLL
    for (int g = 0; g < G; ++g) {
      const char* row = values + (g * B + i) * B * size;
      NB_UNROLL
      for (int k = 0; k < B; k += O::kLanes) {
        if (k * size % 64 == 0) O::prefetch(row + k * size + kAheadBytes);
        const typename O::F w = O::load_as(type, row + k * size);
        NB_UNROLL
        for (int m = 0; m < MR; ++m) sum[m] = O::fmaf(w, O::loadf(xs[g] + m * B + k), sum[m]);
      }
    }
    NB_UNROLL
    for (int m = 0; m < MR; ++m) O::storef(acc + m * O::kLanes, sum[m]);
  }
}

// The block at the ragged end of the columns: what it stores behind them may be anything.
template <class O, int B, int MR, class T>
static void small_ragged(T type, int size, const char* values, int64_t live, const float* x,
                         int64_t i0, int64_t i1, float* acc) {
  for (int64_t i = i0; i < i1; ++i, acc += MR * O::kLanes) {
    float row[B] = {};
    widen<O>(type, size, values + i * B * size, live, row);
    for (int k = 0; k < B; k += O::kLanes) {
      for (int m = 0; m < MR; ++m) {
        float* a = acc + m * O::kLanes;
        O::storef(a, O::fmaf(O::loadf(row + k), O::loadf(x + m * B + k), O::loadf(a)));
      }
    }
  }
}

// out[m][i - i0] (+)= rows [i0, i1) of block row `u` times x. i0 and i1 are multiples of 16.
template <class O, int B, int MR, class T>
static void small_block_row(T type, int size, const Walk& walk, const void* values, int64_t u,
                            const float* x, int64_t i0, int64_t i1, float* out, int64_t out_stride,
                            int64_t rows, bool add) {
  alignas(64) float acc[B * MR * O::kLanes];
  memset(acc, 0, static_cast<size_t>((i1 - i0) * MR * O::kLanes) * sizeof(float));
  const int64_t begin = walk.ptr[u], stored = walk.ptr[u + 1];
  const bool ragged = walk.in_size % B && stored > begin && walk.in[stored - 1] == walk.ins - 1;
  const int64_t end = stored - ragged;
  const auto at = [&](int64_t e) { return static_cast<const char*>(values) + e * B * B * size; };
  int64_t e = begin;
  for (; e + 4 <= end; e += 4)
    small_blocks<O, B, MR, 4>(type, size, at(e), walk.in + e, x, i0, i1, acc);
  if (e + 2 <= end) {
    small_blocks<O, B, MR, 2>(type, size, at(e), walk.in + e, x, i0, i1, acc);
    e += 2;
  }
  if (e < end) small_blocks<O, B, MR, 1>(type, size, at(e), walk.in + e, x, i0, i1, acc);
  if (ragged) {
    const int64_t live = walk.in_size - (walk.ins - 1) * B;
    small_ragged<O, B, MR>(type, size, at(end), live, x + (walk.ins - 1) * MR * B, i0, i1, acc);
  }
  for (int64_t i = 0; i < i1 - i0; i += O::kLanes) {
    for (int64_t m = 0; m < rows; ++m) {
      typename O::F lanes[O::kLanes];
      NB_UNROLL
      for (int l = 0; l < O::kLanes; ++l) lanes[l] = O::loadf(acc + ((i + l) * MR + m) * O::kLanes);
      typename O::F sum = O::sum_lanes(lanes);
      float* to = out + m * out_stride + i;
      O::storef(to, add ? O::addf(O::loadf(to), sum) : sum);
    }
  }
}

// The same for any type of values and 1, 2 or 4 slots.
template <class O, int B>
static void small_rows(const Walk& walk, const void* values, Dtype vtype, int64_t u, const float* x,
                       int64_t slots, int64_t i0, int64_t i1, float* out, int64_t out_stride,
                       int64_t rows, bool add) {
  const auto run = [&](auto tag, int size) {
    switch (slots) {
    case 1:
      return small_block_row<O, B, 1>(tag, size, walk, values, u, x, i0, i1, out, out_stride, rows,
                                      add);
    case 2:
      return small_block_row<O, B, 2>(tag, size, walk, values, u, x, i0, i1, out, out_stride, rows,
                                      add);
    default:
      return small_block_row<O, B, 4>(tag, size, walk, values, u, x, i0, i1, out, out_stride, rows,
                                      add);
    }
  };
  if (vtype == Dtype::kF32) {
    run(FloatBits::F32{}, 4);
  } else {
    run(FloatBits::BF16{}, 2);
  }
}

static inline int64_t small_slots(int64_t m) { return m <= 2 ? m : kSmallRows; }

template <class O, int B>
static Status small_of(const BlockSparseParams& p) {
  const Walk walk = make_walk(p.s, false);
  const int64_t slots = small_slots(p.m);
  float* x = static_cast<float*>(aligned_malloc(walk.ins * slots * B * 4));
  if (!x) return kOutOfMemory;
  pack_small<O, B>(walk, p.x, p.xtype, p.x_stride, p.m, slots, x);
  const Parallel& parallel = worth_threads(p, walk);
  const int64_t parts = min64(walk.outs, max64(1, parallel.threads));
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t u = balanced(walk, parts, begin); u < balanced(walk, parts, end); ++u) {
      alignas(64) float y[kSmallRows * B];
      alignas(64) float wide[B];
      const int64_t count = min64(B, walk.out_size - u * B);
      small_rows<O, B>(walk, p.values, p.vtype, u, x, slots, 0, B, y, B, p.m, false);
      const float* bias = widen_bias<O>(p, u * B, count, wide);
      store_rows<O>(p, 0, p.m, u * B, count, y, B, bias);
    }
  };
  parallel_for(parallel, parts, body);
  free(x);
  return kOk;
}

template <class O>
static Status small(const BlockSparseParams& p) {
  switch (p.s.block) {
  case 16:
    return small_of<O, 16>(p);
  case 32:
    return small_of<O, 32>(p);
  case 64:
    return small_of<O, 64>(p);
  default:
    return small_of<O, 128>(p);
  }
}

}  // namespace
}  // namespace nibblock
