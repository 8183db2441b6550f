// The low-rank pair of a fused product: t = x A^T once, then t C^T onto each tile. For dx t = dy C,
// then t A. All float32; both outer factors are kept as [rank][columns], so a tile reads them as
// they lie.
#pragma once

#include "cpu_pieces.h"

namespace nibblock {
namespace {

struct LowRank {
  int64_t rank = 0;
  float* memory = nullptr;
  const float* outer = nullptr;  // [rank][padded]: C^T, or A for dx
  int64_t padded = 0;
  const float* t = nullptr;  // [rows][rank]

  // Fills the above; false when out of memory.
  template <class O>
  bool make(const Int4BlockSparseParams& p, bool dx);
  void release() { free(memory); }

  // acc += t times columns [n0, n0 + cols) of `outer`. acc has room for whole vectors.
  template <class O>
  void add(int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* acc,
           int64_t acc_stride) const {
    if (!rank) return;
    for (int64_t i = 0; i < cols; i += O::kLanes) {
      const float* w = outer + n0 + i;
      for (int64_t r = 0; r < rows; ++r) {
        const float* tr = t + (m0 + r) * rank;
        typename O::F sum = O::loadf(acc + r * acc_stride + i);
        for (int64_t j = 0; j < rank; ++j) {
          sum = O::fmaf(O::set1f(tr[j]), O::loadf(w + j * padded), sum);
        }
        O::storef(acc + r * acc_stride + i, sum);
      }
    }
  }
};

// out[count][rank] turned around into out[rank][padded].
template <class O, class T>
static void turn(T type, int size, const void* c, int64_t count, int64_t rank, int64_t padded,
                 float* out) {
  const char* from = static_cast<const char*>(c);
  for (int64_t n = 0; n < count; n += O::kLanes) {
    for (int64_t j = 0; j < rank; j += O::kLanes) {
      const int64_t depth = min64(O::kLanes, rank - j);
      typename O::F lines[O::kLanes];
      for (int64_t i = 0; i < O::kLanes; ++i) {
        float line[O::kLanes] = {};
        if (n + i < count) widen<O>(type, size, from + ((n + i) * rank + j) * size, depth, line);
        lines[i] = O::loadf(line);
      }
      alignas(64) float square[O::kLanes * O::kLanes];
      O::transpose_store(lines, square, O::kLanes);
      for (int64_t i = 0; i < depth; ++i) {
        O::storef(out + (j + i) * padded + n, O::loadf(square + i * O::kLanes));
      }
    }
  }
}

// t[j] = x . l[j], four at a time; x and the rows of l hold zeros up to `padded`.
template <class O>
static void rank_row(const float* x, const float* l, int64_t padded, int64_t rank, float* t) {
  for (int64_t j = 0; j < rank; j += 4) {
    const float* at[4];
    typename O::F sum[4];
    NB_UNROLL
    for (int q = 0; q < 4; ++q) {
      at[q] = l + min64(j + q, rank - 1) * padded;
      sum[q] = O::set1f(0.0f);
    }
    for (int64_t i = 0; i < padded; i += O::kLanes) {
      NB_UNROLL
      for (int q = 0; q < 4; ++q) sum[q] = O::fmaf(O::loadf(x + i), O::loadf(at[q] + i), sum[q]);
    }
    for (int q = 0; q < 4 && j + q < rank; ++q) {
      float lanes[O::kLanes], total = 0.0f;
      O::storef(lanes, sum[q]);
      for (int c = 0; c < O::kLanes; ++c) total += lanes[c];
      t[j + q] = total;
    }
  }
}

template <class O>
bool LowRank::make(const Int4BlockSparseParams& p, bool dx) {
  rank = p.rank;
  if (!rank) return true;
  const Int4LinearParams& b = p.base;
  const int64_t n_pad = round_up(b.w.n, 16), k_pad = round_up(b.w.k, 16);
  float* c = memory =
      static_cast<float*>(aligned_malloc(((n_pad + k_pad) * rank + b.m * rank) * 4));
  if (!memory) return false;
  float* a = c + n_pad * rank;
  float* out = a + k_pad * rank;
  with_type(p.ltype, [&](auto tag, int size) {
    turn<O>(tag, size, p.c, b.w.n, rank, n_pad, c);
    for (int64_t j = 0; j < rank; ++j) {
      memset(a + j * k_pad + b.w.k, 0, static_cast<size_t>(k_pad - b.w.k) * 4);
      widen<O>(tag, size, static_cast<const char*>(p.a) + j * b.w.k * size, b.w.k, a + j * k_pad);
    }
    for (int64_t j = 0; j < rank; ++j) {
      const int64_t from = round_up(b.w.n, O::kLanes);  // what turn left
      memset(c + j * n_pad + from, 0, static_cast<size_t>(n_pad - from) * 4);
    }
  });
  outer = dx ? a : c;
  padded = dx ? k_pad : n_pad;
  t = out;
  const float* inner = dx ? c : a;
  const int64_t in = dx ? b.w.n : b.w.k, in_pad = dx ? n_pad : k_pad;
  int failed = 0;
  auto rows = [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(aligned_malloc(in_pad * 4));
    if (!row) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    memset(row + in, 0, static_cast<size_t>(in_pad - in) * 4);
    with_type(b.xtype, [&](auto tag, int size) {
      for (int64_t m = begin; m < end; ++m) {
        widen<O>(tag, size, static_cast<const char*>(b.x) + m * b.x_stride * size, in, row);
        rank_row<O>(row, inner, in_pad, rank, out + m * rank);
      }
    });
    free(row);
  };
  parallel_for(b.m * in * rank < (1 << 18) ? kSerial : *b.parallel, b.m, rows);
  return !failed;
}

}  // namespace
}  // namespace nibblock
