// Register tiles of the integer kernels where groups are short and 4-bit codes meet int8: the
// scales of a stretch of kFlushK are multiplied in integers, and its sums become float once.
//
//     y[m, n] += unit[n] * top[m] * sum_b mulhrs(part[m, b], part[n, b]) * (sum_k q * (code - 8))
//                + sum_b xsum[m, b] * (offset[n, b] + 8 * scale[n, b])
//
// part[m, b] is the block's scale of x in 32767ths of the stretch's largest, part[n, b] that of the
// weight in 16384ths of its own, and VPMULHRSW multiplies them. VPMADDWD, which has to widen the
// 16-bit sums of pairs anyway, takes the result as its other factor: 3 instructions for 32 k where
// turning a sum into float and adding it takes 8, as long as the products themselves.
//
// Bounds: a 16-bit lane ends at 16 * 8 * 127 = 16256 or less. (Its sum starts at minus 8 times that
// of its own q, and additions wrap, so what is between does not matter.) 4 blocks of two lanes
// times 16384 are 2130706432, just below 2^31.
//
// Rounding: each scale to half a step of its stretch's largest, and so their product: together at
// most 2^-14 of the largest product, where int8 itself rounds an element by 2^-8.
#pragma once

#include "cpu_integer_tiles.h"

namespace nibblock {
namespace {

// Whether blocks of kPairLines lines are multiplied this way, more rows than a direct tile has.
template <class O, int BITS, int ACT>
constexpr bool can_stretch() {
  return BITS == 4 && ACT == 8 && O::kPairLines > 0;
}

// What the tiles take of a stretch's scales.
template <class O, int C>
struct StretchScales {
  static constexpr int64_t kWidth = C * O::kLanes;
  static constexpr int64_t kMost = O::kPairLines > 0 ? kFlushK / (O::kPairLines * 8) : 1;
  alignas(64) uint8_t part[kMost * C * O::kBytes];  // int16, each twice
  alignas(64) float unit[kWidth];
  alignas(64) float offset[kMost * kWidth];

  // Of `count` groups: scale and offset are [count][kWidth].
  void set(const float* scale, const float* raw_offset, int64_t count) {
    using F = typename O::F;
    using I = typename O::I;
    const I magnitude = O::set1(0x7fffffff);
    for (int64_t i = 0; i < kWidth; i += O::kLanes) {
      I bits = O::set1(0);  // of the largest; a NaN is above every number
      for (int64_t b = 0; b < count; ++b) {
        bits = O::max(bits, O::and_(O::load(scale + b * kWidth + i), magnitude));
      }
      const F top = O::as_float(bits);
      // 16384 / top, 0 for 0; in two factors, for the result may not fit one.
      const F up = O::select_below(top, 1e-30f, 1.8446744073709552e19f, 1.0f);
      const F inverse = O::quotient_or_zero(16384.0f, O::mulf(top, up));
      for (int64_t b = 0; b < count; ++b) {
        const F s = O::loadf(scale + b * kWidth + i);
        const I parts = O::to_integer(O::mulf(O::mulf(s, up), inverse));
        O::store(part + (b * C + i / O::kLanes) * O::kBytes, O::twice16(parts));
        if (raw_offset) {
          O::storef(offset + b * kWidth + i,
                    O::fmaf(s, O::set1f(8.0f), O::loadf(raw_offset + b * kWidth + i)));
        }
      }
      O::storef(unit + i, O::mulf(top, O::set1f(1.0f / 16384.0f)));
    }
  }
};

template <class O, bool AFFINE, int R, int C>
NB_INLINE void flush_stretch(const TileArgs& args, const typename O::I (&sum)[R][C]) {
  const TileArgs a = args;  // a copy: stores to acc could change the caller's
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename O::F top = O::set1f(a.xscale[r]);
    typename O::F y[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      y[c] = O::loadf(a.acc + (r * C + c) * O::kLanes);
      y[c] = O::fmaf(O::to_float(sum[r][c]), O::mulf(O::loadf(a.scale + c * O::kLanes), top), y[c]);
    }
    for (int64_t b = 0; AFFINE && b < a.blocks; ++b) {
      const typename O::F xsum = O::set1f(a.xsum[b * a.rows + r]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        y[c] = O::fmaf(O::loadf(a.offset + (b * C + c) * O::kLanes), xsum, y[c]);
      }
    }
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(a.acc + (r * C + c) * O::kLanes, y[c]);
  }
}

// tile() for a stretch of blocks of kPairLines lines.
template <class O, int R, int C>
static void stretch_tile(const TileArgs& a) {
  typename O::I sum[R][C];
  set_all(sum, O::set1(0));
  const uint8_t* w = a.w[0];
  for (int64_t b = 0; b < a.blocks; ++b) {
    for (int i = 0; i < a.streams; ++i) {
      for (int64_t line = b * a.lines; line < (b + 1) * a.lines; ++line) {
        O::prefetch(a.ahead[i] + line * a.ahead_step);
      }
    }
    typename O::I pairs[R][C];
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      NB_UNROLL
      for (int c = 0; c < C; ++c) pairs[r][c] = O::set1(a.init[b * a.rows + r]);
    }
    pair_lines<O, R, C>(w, a.x + b * a.x_block, a.x_stride, pairs);
    w += O::kPairLines * 2 * C * O::kBytes;
    // The sums stay on the stack until here: in registers they would push the pairs out.
    __asm__ volatile("" ::: "memory");
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename O::I xpart = O::set1(a.part[b * a.rows + r]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        const typename O::I part = O::mulhrs(xpart, O::load(a.parts + (b * C + c) * O::kBytes));
        sum[r][c] = O::add(sum[r][c], O::madd(pairs[r][c], part));
      }
    }
  }
  if (a.offset) {
    flush_stretch<O, true, R, C>(a, sum);
  } else {
    flush_stretch<O, false, R, C>(a, sum);
  }
}

// The tile for `rows` rows.
template <class O, int C, int R = O::kRows>
static TileFn stretch_tile_for(int rows) {
  if (rows == R) return &stretch_tile<O, R, C>;
  if constexpr (R > 1) return stretch_tile_for<O, C, R - 1>(rows);
  return nullptr;
}

}  // namespace
}  // namespace nibblock
