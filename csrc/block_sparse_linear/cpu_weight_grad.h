// block_weight_grad, the product of two dense matrices over their rows where listed blocks ask for
// it, for AVX2 and AVX-512.
//
//     out_z[n, k] = sum_m g[m, I_z B + n] * x[m, J_z B + k]
//
// Tokens are taken kTokens at a time: the column blocks of g and x that occur are widened to
// float32 as [block][m][B], once for all blocks that share them, then every listed block runs
// register tiles of R n x C vectors of k down the tokens. A step loads C vectors of x and
// broadcasts R neighbours of g. Within a chunk a block goes over its tokens in pieces whose two
// operands fit L1.
//
// Determinism: an output is one chain of FMAs over m. Only where the list is short (few tasks) and
// the tokens many is the sum cut, into parts of kPartRows added in their order; the shapes alone
// decide.
#pragma once

#include "cpu_pieces.h"

namespace nibblock {
namespace {

constexpr int64_t kTokens = 256;
constexpr int64_t kPieceFloats = 4096;   // of one operand: 16 KiB
constexpr int64_t kShortList = 1 << 16;  // gradient elements up to which tokens are split
constexpr int64_t kPartRows = 512;
constexpr int64_t kMostParts = 16;

// out[R][C vectors] += g^T x: rows of g are GW apart, rows of x and out XW.
template <class O, int GW, int XW, int R>
static __attribute__((noinline)) void grad_tile(const float* g, const float* x, int64_t rows,
                                                float* out) {
  using F = typename O::F;
  constexpr int C = Shape<O, XW>::kCols;
  F sum[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = O::loadf(out + r * XW + c * O::kLanes);
  }
  for (int64_t m = 0; m < rows; ++m, g += GW, x += XW) {
    F xv[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) xv[c] = O::loadf(x + c * O::kLanes);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const F gv = O::set1f(g[r]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(gv, xv[c], sum[r][c]);
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(out + r * XW + c * O::kLanes, sum[r][c]);
  }
}

// out[GW][XW] += g[rows][GW]^T x[rows][XW]: GW rows in tiles of the full height and one of what is
// left (which the template knows).
template <class O, int GW, int XW>
static void grad_block(const float* g, const float* x, int64_t rows, float* out) {
  using S = Shape<O, XW>;
  constexpr int64_t kPiece = kPieceFloats / (GW > XW ? GW : XW);
  constexpr int kTiles = (GW + S::kRows - 1) / S::kRows;
  constexpr int kHigh = (GW + kTiles - 1) / kTiles, kHighs = GW - kTiles * (kHigh - 1);
  for (int64_t m = 0; m < rows; m += kPiece) {
    const int64_t count = min64(kPiece, rows - m);
    for (int k = 0; k < XW; k += S::kWidth) {
      const float* gm = g + m * GW;
      const float* xm = x + m * XW + k;
      float* o = out + k;
      for (int i = 0; i < kTiles; ++i) {
        const int height = i < kHighs ? kHigh : kHigh - 1;
        if (i < kHighs) {
          grad_tile<O, GW, XW, kHigh>(gm, xm, count, o);
        } else {
          grad_tile<O, GW, XW, kHigh - 1 ? kHigh - 1 : 1>(gm, xm, count, o);
        }
        gm += height;
        o += height * XW;
      }
    }
  }
}

// Columns [j * B, (j + 1) * B) of rows [m0, m0 + rows), as [rows][B]; zeros behind the last column.
template <class O, int B>
static void pack_columns(const void* x, Dtype type, int64_t stride, int64_t size, int64_t j,
                         int64_t m0, int64_t rows, float* out) {
  const int64_t count = min64(B, size - j * B);
  with_type(type, [&](auto tag, int bytes) {
    for (int64_t r = 0; r < rows; ++r, out += B) {
      if (count < B) memset(out, 0, B * sizeof(float));
      widen<O>(tag, bytes, static_cast<const char*>(x) + ((m0 + r) * stride + j * B) * bytes, count,
               out);
    }
  });
}

// One block's sums to its place: the sum of `parts` partial sums, zeros outside the matrix,
// rounded.
template <class O, int B>
static void finish_block(const BlockWeightGradParams& p, int64_t z, int64_t row, const float* sums,
                         int64_t parts, int64_t part_stride) {
  const int64_t rows = min64(B, p.s.n - row * B), cols = min64(B, p.s.k - p.s.col[z] * B);
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < B; k += O::kLanes) {
      typename O::F v = O::loadf(sums + i * B + k);
      for (int64_t q = 1; q < parts; ++q)
        v = O::addf(v, O::loadf(sums + q * part_stride + i * B + k));
      if (i >= rows || k + O::kLanes > cols) {
        float lanes[O::kLanes];
        O::storef(lanes, v);
        for (int64_t l = i < rows ? max64(0, cols - k) : 0; l < O::kLanes; ++l) lanes[l] = 0.0f;
        v = O::loadf(lanes);
      }
      const int64_t at = (z * B + i) * B + k;
      if (p.out_type == Dtype::kF32) {
        O::store_as(FloatBits::F32{}, static_cast<float*>(p.out) + at, v);
      } else {
        O::store_as(FloatBits::BF16{}, static_cast<uint16_t*>(p.out) + at, v);
      }
    }
  }
}

template <class O, int B>
static Status weight_grad_of(const BlockWeightGradParams& p) {
  const int64_t rows = ceil_div(p.s.n, B), cols = ceil_div(p.s.k, B), Z = p.s.count;
  const int64_t size = Z * B * B;
  static const Parallel serial = {nullptr, 1};
  const Parallel& parallel = p.m * size < (1 << 17) ? serial : *p.parallel;
  int64_t parts = size <= kShortList ? min64(kMostParts, ceil_div(p.m, kPartRows)) : 1;
  if (parts < 1) parts = 1;
  const int64_t part_rows = ceil_div(p.m, parts);
  const bool in_place = parts == 1 && p.out_type == Dtype::kF32;
  // g and x of kTokens rows for each part, then the sums.
  const int64_t tokens = min64(kTokens, max64(1, part_rows));
  const int64_t packed = (rows + cols) * tokens * B;
  float* memory =
      static_cast<float*>(aligned_malloc((parts * packed + (in_place ? 0 : parts * size)) * 4));
  if (!memory) return kOutOfMemory;
  float* sums = in_place ? static_cast<float*>(p.out) : memory + parts * packed;
  memset(sums, 0, static_cast<size_t>(parts * size) * 4);
  for (int64_t m = 0; m < part_rows; m += tokens) {
    auto span = [&](int64_t part, int64_t* m0) {
      const int64_t end = min64(p.m, (part + 1) * part_rows);
      *m0 = part * part_rows + m;
      return max64(0, min64(min64(tokens, part_rows - m), end - *m0));
    };
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j = t % (rows + cols);
        int64_t m0;
        const int64_t count = span(t / (rows + cols), &m0);
        float* out = memory + t * tokens * B;
        if (j < rows) {
          if (p.s.row_ptr[j] == p.s.row_ptr[j + 1]) continue;
          pack_columns<O, B>(p.g, p.gtype, p.g_stride, p.s.n, j, m0, count, out);
        } else {
          const int64_t c = j - rows;
          if (p.s.col_ptr[c] == p.s.col_ptr[c + 1]) continue;
          pack_columns<O, B>(p.x, p.gtype, p.x_stride, p.s.k, c, m0, count, out);
        }
      }
    };
    parallel_for(parallel, parts * (rows + cols), pack);
    auto multiply = [&](int64_t begin, int64_t end) {
      int64_t row = 0;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t part = t / Z, z = t % Z;
        if (p.s.row_ptr[row] > z) row = 0;
        while (p.s.row_ptr[row + 1] <= z) ++row;
        int64_t m0;
        const int64_t count = span(part, &m0);
        const float* at = memory + part * packed;
        grad_block<O, B, B>(at + row * tokens * B, at + (rows + p.s.col[z]) * tokens * B, count,
                            sums + part * size + z * B * B);
      }
    };
    parallel_for(parallel, parts * Z, multiply);
  }
  auto finish = [&](int64_t begin, int64_t end) {
    int64_t row = 0;
    for (int64_t z = begin; z < end; ++z) {
      while (p.s.row_ptr[row + 1] <= z) ++row;
      const bool ragged = (row + 1) * B > p.s.n || (p.s.col[z] + 1) * B > p.s.k;
      if (!in_place || ragged) finish_block<O, B>(p, z, row, sums + z * B * B, parts, size);
    }
  };
  parallel_for(parallel, Z, finish);
  free(memory);
  return kOk;
}

template <class O>
static Status weight_grad(const BlockWeightGradParams& p) {
  switch (p.s.block) {
  case 16:
    return weight_grad_of<O, 16>(p);
  case 32:
    return weight_grad_of<O, 32>(p);
  case 64:
    return weight_grad_of<O, 64>(p);
  default:
    return weight_grad_of<O, 128>(p);
  }
}

}  // namespace
}  // namespace nibblock
