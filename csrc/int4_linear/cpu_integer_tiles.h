// Register tiles of the integer kernels: a few quantised rows times a few vectors of codes, and how
// codes come out of a packed line. The ISA file defines the vector operations O (cpu_integer.h).
#pragma once

#include "../common/kernel.h"
#include "int4_linear.h"

namespace nibblock {
namespace {

// The operand of one step of the dot product, out of 8 k of codes for one vector of rows: ACT == 16
// takes 4 steps of 16-bit pairs, ACT == 8 two of byte quadruples. With 8 bits the codes are two
// vectors, of which odd steps take the second.
template <class O, int BITS, int ACT>
NB_INLINE typename O::I operand_of(typename O::I codes, int step) {
  if (BITS == 4 && ACT == 16) {
    if (step == 0) return O::and_(codes, O::set1(0x000f000f));
    if (step == 1) return O::and_(O::template shr16<4>(codes), O::set1(0x000f000f));
    if (step == 2) return O::and_(O::template shr16<8>(codes), O::set1(0x000f000f));
    return O::template shr16<12>(codes);
  }
  if (BITS == 4) {
    return O::and_(step ? O::template shr16<4>(codes) : codes, O::set1(0x0f0f0f0f));
  }
  if (ACT == 8) return codes;
  return step < 2 ? O::and_(codes, O::set1(0x00ff00ff)) : O::template shr16<8>(codes);
}

template <class O, int BITS, int ACT>
NB_INLINE typename O::I unpack_step(const uint8_t* at, int step) {
  return operand_of<O, BITS, ACT>(O::load(at + (BITS == 8 ? step % 2 * 64 : 0)), step);
}

// The two vectors that 8 bits hold for the places of a panel's palette.
template <class O>
NB_INLINE void look_up(const uint8_t* at, const uint8_t* palette, typename O::I* codes) {
  const typename O::I places = O::load(at), table = O::load_table(palette);
  codes[0] = O::lookup(table, operand_of<O, 4, 8>(places, 0));
  codes[1] = O::lookup(table, operand_of<O, 4, 8>(places, 1));
}

// All steps, each vector loaded once.
template <class O, int BITS, int ACT>
NB_INLINE void unpack8(const uint8_t* at, typename O::I* w, const uint8_t* palette) {
  typename O::I codes[2];
  if (BITS == kPalette) {
    look_up<O>(at, palette, codes);
  } else {
    codes[0] = O::load(at);
    codes[1] = BITS == 8 ? O::load(at + 64) : codes[0];
  }
  NB_UNROLL
  for (int step = 0; step < (ACT == 16 ? 4 : 2); ++step) {
    w[step] = operand_of<O, BITS == 4 ? 4 : 8, ACT>(codes[step % 2], step);
  }
}

// What a tile works on: a stretch of k, one or more blocks between two flushes.
struct TileArgs {
  const uint8_t* w[8];  // direct: codes of each vector of rows; panel: w[0] is the unpacked stretch
  const uint8_t* palette[8];  // of these vectors, if there are palettes
  const uint8_t* x;           // quantised rows
  int64_t x_stride;           // bytes
  int64_t lines;              // of a block, 8 k each
  const float* xscale;        // [R], of the first block
  const int32_t* init;
  const uint8_t* column_init;  // [C] vectors, with signed codes instead of init
  const float* xsum;
  const float* scale;   // [blocks][C * kLanes] of the blocks' groups
  const float* offset;  // the same, or null
  float* acc;           // [R][C * kLanes] float sums
  int64_t blocks;
  int64_t x_block;  // bytes from a block of x to the next
  int64_t rows;     // floats from one block's xscale, init and xsum to the next
  // In stretches (cpu_integer_stretch.h): the parts that blocks have of xscale and of scale.
  const int32_t* part;   // [R], of the first block
  const uint8_t* parts;  // [blocks][C] vectors
  // Panel: what to fetch meanwhile, a cache line of each stream for every 8 k.
  const uint8_t* ahead[4];
  int streams;
  int64_t ahead_step;  // bytes
};

// Adds the sums of block b to acc.
template <class O, bool AFFINE, int R, int C>
NB_INLINE void flush(const TileArgs& args, int64_t b, typename O::I (&sum)[R][C]) {
  const TileArgs a = args;  // a copy: stores to acc could change the caller's
  const float* scale = a.scale + b * C * O::kLanes;
  const float* offset = a.offset + (AFFINE ? b * C * O::kLanes : 0);
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename O::F xscale = O::set1f(a.xscale[b * a.rows + r]);
    const typename O::F xsum = O::set1f(a.xsum[b * a.rows + r]);
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      float* acc = a.acc + r * C * O::kLanes + c * O::kLanes;
      typename O::F y = O::loadf(acc);
      if (AFFINE) y = O::fmaf(O::loadf(offset + c * O::kLanes), xsum, y);
      const typename O::F s = O::mulf(O::loadf(scale + c * O::kLanes), xscale);
      O::storef(acc, O::fmaf(O::to_float(sum[r][c]), s, y));
    }
  }
}

template <class O, int R, int C>
NB_INLINE void flush_any(const TileArgs& a, int64_t b, typename O::I (&sum)[R][C]) {
  if (a.offset) {
    flush<O, true, R, C>(a, b, sum);
  } else {
    flush<O, false, R, C>(a, b, sum);
  }
}

template <class I, int R, int C>
NB_INLINE void set_all(I (&tile)[R][C], I value) {
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) tile[r][c] = value;
  }
}

// Adds kPairLines lines of unpacked operands to `pairs`: pairs of products, added in 16 bits, which
// is as many as fit.
template <class O, int R, int C>
NB_INLINE void pair_lines(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                          typename O::I (&pairs)[R][C]) {
  NB_UNROLL
  for (int step = 0; step < O::kPairLines * 2; ++step) {
    typename O::I wv[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) wv[c] = O::load(w + (step * C + c) * O::kBytes);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename O::I xv = O::broadcast(x + r * x_stride + 4 * step);
      NB_UNROLL
      for (int c = 0; c < C; ++c) pairs[r][c] = O::add_pairs(pairs[r][c], wv[c], xv);
    }
  }
}

// What tile() is for a panel where O adds pairs in 16 bits, in blocks of any number of kPairLines.
template <class O, int R, int C>
NB_INLINE void pair_tile(const TileArgs& a) {
  constexpr int64_t kBytes = O::kPairLines * 2 * C * O::kBytes;
  const uint8_t* w = a.w[0];
  for (int64_t b = 0; b < a.blocks; ++b) {
    const uint8_t* x = a.x + b * a.x_block;
    typename O::I pairs[R][C], sum[R][C];
    for (int i = 0; i < a.streams; ++i) {
      for (int64_t line = b * a.lines; line < (b + 1) * a.lines; ++line) {
        O::prefetch(a.ahead[i] + line * a.ahead_step);
      }
    }
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        sum[r][c] = O::kSignedCodes ? O::load(a.column_init + c * O::kBytes)
                                    : O::set1(a.init[b * a.rows + r]);
      }
    }
    for (int64_t first = 0; first < a.lines; first += O::kPairLines) {
      set_all(pairs, O::set1(0));
      pair_lines<O, R, C>(w, x, a.x_stride, pairs);
      w += kBytes;
      x += O::kPairLines * 2 * 4;
      const typename O::I ones = O::ones_here();
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        NB_UNROLL
        for (int c = 0; c < C; ++c) {
          sum[r][c] = O::add(sum[r][c], O::sum_pairs(pairs[r][c], ones));
        }
      }
    }
    flush_any<O, R, C>(a, b, sum);
  }
}

// A stretch of k for R rows of x and C vectors of rows of W. PANEL: operands come unpacked.
template <class O, int BITS, int ACT, bool PANEL, int R, int C>
static void tile(const TileArgs& a) {
  constexpr int kSteps = ACT == 16 ? 4 : 2;  // broadcasts of 4 bytes for each 8 k
  if constexpr (PANEL && ACT == 8 && O::kPairLines > 0) {
    pair_tile<O, R, C>(a);
  } else {
    constexpr int64_t kLineBytes = line_bytes(BITS);
    const uint8_t* w = a.w[0];
    for (int64_t b = 0; b < a.blocks; ++b) {
      const uint8_t* x = a.x + b * a.x_block;
      typename O::I sum[R][C];
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        NB_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = O::set1(a.init[b * a.rows + r]);
      }
      if constexpr (PANEL) {
        for (int64_t line = b * a.lines; line < (b + 1) * a.lines; ++line) {
          for (int i = 0; i < a.streams; ++i) O::prefetch(a.ahead[i] + line * a.ahead_step);
          NB_UNROLL_DEPTH
          for (int step = 0; step < kSteps; ++step) {
            typename O::Operand wv[C];
            NB_UNROLL
            for (int c = 0; c < C; ++c) wv[c] = O::operand(w + c * O::kBytes);
            NB_UNROLL
            for (int r = 0; r < R; ++r) {
              const typename O::I xv = O::broadcast(x + r * a.x_stride);
              NB_UNROLL
              for (int c = 0; c < C; ++c) sum[r][c] = O::template dot<ACT>(sum[r][c], wv[c], xv);
            }
            w += C * O::kBytes;
            x += 4;
          }
        }
      } else {
        const int64_t begin = b * a.lines * kLineBytes, end = begin + a.lines * kLineBytes;
        for (int64_t at = begin; at < end; at += kLineBytes) {
          typename O::I wv[C][kSteps], found[C][2];
          NB_UNROLL
          for (int c = 0; c < C; ++c) {
            O::prefetch(a.w[c] + at + O::kPrefetch);
            if (BITS == 8) O::prefetch(a.w[c] + at + O::kPrefetch + 64);
            if (!O::kStepwise) unpack8<O, BITS, ACT>(a.w[c] + at, wv[c], a.palette[c]);
            if (O::kStepwise && BITS == kPalette) look_up<O>(a.w[c] + at, a.palette[c], found[c]);
          }
          NB_UNROLL
          for (int s = 0; s < kSteps; ++s) {
            NB_UNROLL
            for (int c = 0; c < C && O::kStepwise; ++c) {
              wv[c][s] = BITS == kPalette ? operand_of<O, 8, ACT>(found[c][s % 2], s)
                                          : unpack_step<O, BITS, ACT>(a.w[c] + at, s);
            }
            NB_UNROLL
            for (int r = 0; r < R; ++r) {
              const typename O::I xv = O::broadcast(x + r * a.x_stride + 4 * s);
              NB_UNROLL
              for (int c = 0; c < C; ++c) {
                sum[r][c] = O::template dot<ACT>(sum[r][c], wv[c][s], xv);
              }
            }
          }
          x += 4 * kSteps;
        }
      }
      flush_any<O, R, C>(a, b, sum);
    }
  }
}

using TileFn = void (*)(const TileArgs&);

// The tile for `rows` rows. One and two rows go through decode(), not through direct tiles.
template <class O, int BITS, int ACT, bool PANEL, int C, int R = PANEL ? O::kRows : O::kDirectRows>
static TileFn tile_for(int rows) {
  if (rows == R) return &tile<O, BITS, ACT, PANEL, R, C>;
  if constexpr (R > (PANEL ? 1 : 3)) return tile_for<O, BITS, ACT, PANEL, C, R - 1>(rows);
  return nullptr;
}

}  // namespace
}  // namespace nibblock
