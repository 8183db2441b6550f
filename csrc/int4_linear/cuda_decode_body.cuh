// The decode kernel's body, one thread's view. cuda_decode.h draws the layout; cuda_common.cuh
// holds the instructions, for the GPU or for the software model of the tests.
#pragma once

#include "../common/cuda_common.cuh"
#include "cuda_codes.cuh"
#include "cuda_decode.h"

namespace nibblock {
namespace cuda {

struct DecodeParams {
  const uint8_t* packed;                        // multiple of 16
  const uint16_t* x;                            // [m, k] of the kernel's 16-bit type
  uint16_t* y;                                  // [m, n], the same type
  const void* bias;                             // [n] or null
  Floats4* partials;                            // 2 * blocks slots of slot_floats
  int32_t* counters;                            // one for each tile, zero before and after
  int64_t panel_stride, scales_at, offsets_at;  // bytes
  int64_t x_stride, y_stride;                   // elements
  int32_t m, n, k, k_pad, panels, groups, shift;
  int32_t bias_type;   // 0 float32, 1 bfloat16, 2 float16
  int32_t wide_scale;  // scales are float32, else float16
  int32_t x_aligned;   // x and its row stride are multiples of 16 bytes
  int32_t y_aligned;   // y and its row stride are multiples of 8 bytes
  Schedule schedule;
  // The adapter's blocks, sorted by block row, then column block (block_sparse_linear.h). Kernels
  // without an adapter do not look at these.
  const void* values;      // [Z, B, B] value_type, multiple of 16
  const int32_t* row_ptr;  // [ceil(n / B) + 1]
  const int32_t* col;      // [Z]
  int32_t block_shift;     // log2 B: 5, 6 or 7
  int32_t value_type;      // 0 float32, 1 bfloat16, 2 float16
};

// The adapter's blocks that a warp has not met yet: the first of them, the end of its block row,
// and the stage and the step where it begins.
struct Blocks {
  int32_t z, end, chunk, step;
};

template <class T, class Shape>
struct Decode {
  static constexpr int kNt = Shape::nt;

  const DecodeParams& p;
  uint8_t* shared;
  int block, thread, warp, lane;
  Lane at;
  uint64_t policy;

  // Begins the copies of one unit into a stage.
  NB_DEVICE void fetch(const Cursor& c, int stage) const {
    uint8_t* const base = shared + stage * Shape::stage_bytes;
    const int row_tile = c.tile / p.schedule.token_tiles;
    const int token_tile = c.tile - row_tile * p.schedule.token_tiles;
    const int k0 = c.chunk * kStageK;
    const int panel = (row_tile * Shape::warps + warp) * 2 + (at.g >> 2);
    const bool rows_exist = panel < p.panels;
    const uint8_t* const codes = p.packed + (rows_exist ? panel * p.panel_stride : 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int line_k = k0 + step * kStepK + 8 * at.t;
      const bool there = rows_exist && line_k < p.k_pad;
#pragma unroll
      for (int half = 0; half < Shape::halves; ++half) {
        const int64_t byte = there ? weight_byte(Shape::halves, line_k, half, at.g) : 0;
        copy_async_16_once(base + weight_place(Shape::halves, warp, step, half, lane), codes + byte,
                           there ? 16 : 0, policy);
      }
    }
    // Lane 4g + t copies group t of the stage for its four rows.
    const int group = (k0 >> p.shift) + at.t;
    if (at.t < stage_groups(p.shift)) {
      const bool there = rows_exist && group < p.groups;
      const int64_t first = there ? static_cast<int64_t>(group) * kPanel + 4 * (at.g & 3) : 0;
      const int place = scale_place(warp, at.t, at.g);
      if (p.wide_scale) {
        const int bytes = there ? 16 : 0;
        copy_async_16(base + Shape::scales_at + place, codes + p.scales_at + 4 * first, bytes);
        if constexpr (Shape::affine) {
          copy_async_16(base + Shape::offsets_at + place, codes + p.offsets_at + 4 * first, bytes);
        }
      } else {
        const int bytes = there ? 8 : 0;
        copy_async_8(base + Shape::scales_at + place, codes + p.scales_at + 2 * first, bytes);
        if constexpr (Shape::affine) {
          copy_async_8(base + Shape::offsets_at + place, codes + p.offsets_at + 2 * first, bytes);
        }
      }
    }
    constexpr int kUnits = Shape::tokens * (kStageK / 8);
#pragma unroll
    for (int first = 0; first < kUnits; first += Shape::threads) {
      const int index = first + thread;
      const int token = index / (kStageK / 8), unit = index % (kStageK / 8);
      const int m = token_tile * Shape::tokens + token;
      fetch_x(base + Shape::x_at + x_place(token, unit), m, k0 + 8 * unit);
    }
  }

  // 8 k of one token; zeros outside x.
  NB_DEVICE void fetch_x(uint8_t* place, int m, int k0) const {
    const int left = m < p.m ? p.k - k0 : 0;
    const int count = left < 0 ? 0 : left < 8 ? left : 8;
    const uint16_t* const from = p.x + (count > 0 ? m * p.x_stride + k0 : 0);
    if (p.x_aligned) {
      copy_async_16(place, from, 2 * count);
      return;
    }
    Words4 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? load_global(from + 2 * i) : 0;
      const uint32_t high = 2 * i + 1 < count ? load_global(from + 2 * i + 1) : 0;
      v.w[i] = low | high << 16;
    }
    store_shared(place, v);
  }

  NB_DEVICE void look(Blocks& b) const {
    const int k = b.z < b.end ? load_global(p.col + b.z) << p.block_shift : -1;
    b.chunk = k < 0 ? -1 : k / kStageK;
    b.step = (k % kStageK) / kStepK;
  }

  // The first block of the warp's rows that lies in this stage or behind it.
  NB_DEVICE void seek(Blocks& b, const Cursor& c) const {
    const int row = (c.tile / p.schedule.token_tiles * Shape::warps + warp) * kWarpRows;
    b = {0, 0, -1, 0};
    if (row >= p.n) return;
    const int32_t* const ends = p.row_ptr + (row >> p.block_shift);
    b.end = load_global(ends + 1);
    const int first = (c.chunk * kStageK) >> p.block_shift;
    int low = load_global(ends), high = b.end;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (load_global(p.col + middle) < first) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    b.z = low;
    look(b);
  }

  // 8 k of the lane's four rows of block z, columns 32 part + 8t on; zeros behind the last k of x.
  NB_DEVICE void load_values(int z, int part, int k0, int row, Words4 (&v)[4]) const {
    const int edge = 1 << p.block_shift;
    const int left = p.k - k0 - 8 * at.t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = (row & (edge - 1)) + lane_row(at.g) + i;
      const int64_t from = (static_cast<int64_t>(z) * edge + r) * edge + kStepK * part + 8 * at.t;
      if (p.value_type == 0) {
        const Floats4* const f =
            reinterpret_cast<const Floats4*>(static_cast<const float*>(p.values) + from);
        const Floats4 low = load_global(f), high = load_global(f + 1);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          v[i].w[w] = round_to<T>(low.f[2 * w]) |
                      static_cast<uint32_t>(round_to<T>(low.f[2 * w + 1])) << 16;
          v[i].w[2 + w] = round_to<T>(high.f[2 * w]) |
                          static_cast<uint32_t>(round_to<T>(high.f[2 * w + 1])) << 16;
        }
      } else {
        v[i] = load_global(
            reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(p.values) + from));
        if ((p.value_type == 1) != T::kIsBF16) {
#pragma unroll
          for (int w = 0; w < 4; ++w) v[i].w[w] = other_pair(v[i].w[w]);
        }
      }
      if (left < 8) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if (2 * w + 1 >= left) v[i].w[w] &= 2 * w >= left ? 0u : 0xffffu;
        }
      }
    }
  }

  // A pair of the other 16-bit type.
  static NB_DEVICE uint32_t other_pair(uint32_t w) {
    const uint16_t low = static_cast<uint16_t>(w), high = static_cast<uint16_t>(w >> 16);
    const float a = T::kIsBF16 ? widen<Float16>(low) : widen<BFloat16>(low);
    const float b = T::kIsBF16 ? widen<Float16>(high) : widen<BFloat16>(high);
    return round_to<T>(a) | static_cast<uint32_t>(round_to<T>(b)) << 16;
  }

  // Products of the adapter's blocks in this stage. v holds the first one's values already: they
  // were asked for before the codes were multiplied.
  NB_DEVICE void adapt(const uint8_t* base, const Cursor& c, int row, Blocks& b, Words4 (&v)[4],
                       float (&sums)[2][kNt][4]) const {
    bool first = true;
    while (b.chunk == c.chunk) {
      for (int part = 0; part << 5 < 1 << p.block_shift; ++part) {
        const int step = b.step + part;
        if (!first) load_values(b.z, part, c.chunk * kStageK + step * kStepK, row, v);
        first = false;
        sync_warp();
#pragma unroll
        for (int j = 0; j < kNt; ++j) {
          const Words4 x = load_shared<Words4>(base + Shape::x_at +
                                               x_place(kTokens * j + at.g, 4 * step + at.t));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              const uint32_t a[4] = {v[2 * u].w[2 * i], v[2 * u + 1].w[2 * i],
                                     v[2 * u].w[2 * i + 1], v[2 * u + 1].w[2 * i + 1]};
              multiply_add_tile<T>(sums[u][j], a, x.w[2 * i], x.w[2 * i + 1]);
            }
          }
        }
      }
      ++b.z;
      look(b);
    }
  }

  // sums[u][j][..] belong to rows 4 (g % 4) + 2u (first two) and + 1 (last two), tokens 8j + 2t and
  // + 1.
  NB_DEVICE void compute(int stage, const Cursor& c, Blocks& blocks,
                         float (&sums)[2][kNt][4]) const {
    const uint8_t* const base = shared + stage * Shape::stage_bytes;
    const int row = (c.tile / p.schedule.token_tiles * Shape::warps + warp) * kWarpRows;
    Words4 values[4];
    if constexpr (Shape::adapter) {
      if (blocks.chunk == c.chunk) {
        load_values(blocks.z, 0, c.chunk * kStageK + blocks.step * kStepK, row, values);
      }
    }
    float part[2][kNt][4] = {};
    float x_sums[kNt][4] = {};  // only if affine
    // fetch and load_values branch by lane
    sync_warp();
    const uint32_t ones[4] = {T::kOnes, T::kOnes, T::kOnes, T::kOnes};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Words4 w[2];
#pragma unroll
      for (int half = 0; half < Shape::halves; ++half) {
        w[half] = load_shared<Words4>(base + weight_place(Shape::halves, warp, step, half, lane));
      }
      uint32_t a[2][2][4];  // [u][i]
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        uint32_t v[4];
        pairs<T, Shape::bits>(w[0].w[row], w[Shape::halves - 1].w[row], v);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[row >> 1][i][row & 1] = v[2 * i];
          a[row >> 1][i][2 + (row & 1)] = v[2 * i + 1];
        }
      }
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        const Words4 b =
            load_shared<Words4>(base + Shape::x_at + x_place(kTokens * j + at.g, 4 * step + at.t));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add_tile<T>(part[0][j], a[0][i], b.w[2 * i], b.w[2 * i + 1]);
          multiply_add_tile<T>(part[1][j], a[1][i], b.w[2 * i], b.w[2 * i + 1]);
          if constexpr (Shape::affine) {
            multiply_add_tile<T>(x_sums[j], ones, b.w[2 * i], b.w[2 * i + 1]);
          }
        }
      }
      if (step_ends_group(p.shift, step)) scale(base, step, part, x_sums, sums);
    }
    if constexpr (Shape::adapter) {
      adapt(base, c, row, blocks, values, sums);
    }
  }

  // Adds the finished group: scale * sum of codes and x, and offset * sum of x.
  NB_DEVICE void scale(const uint8_t* base, int step, float (&part)[2][kNt][4],
                       float (&x_sums)[kNt][4], float (&sums)[2][kNt][4]) const {
    const int place = scale_place(warp, step_slot(p.shift, step), at.g);
    const Floats4 s = load_scales(base + Shape::scales_at + place, p.wide_scale);
    Floats4 o = {};
    if constexpr (Shape::affine) {
      o = load_scales(base + Shape::offsets_at + place, p.wide_scale);
      constexpr float kCentre = Shape::bits == 4 ? 8.0f : 128.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) o.f[i] = fma_float(kCentre, s.f[i], o.f[i]);
    }
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 2 * u + (e >> 1);
          sums[u][j][e] = fma_float(s.f[row], part[u][j][e], sums[u][j][e]);
          if constexpr (Shape::affine) {
            sums[u][j][e] = fma_float(o.f[row], x_sums[j][e & 1], sums[u][j][e]);
          }
          part[u][j][e] = 0.0f;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) x_sums[j][e] = 0.0f;
    }
  }

  // The lane's 4 rows of token 8j + 2t + e.
  static NB_DEVICE Floats4 four_rows(const float (&sums)[2][kNt][4], int j, int e) {
    return Floats4{{sums[0][j][e], sums[0][j][2 + e], sums[1][j][e], sums[1][j][2 + e]}};
  }

  NB_DEVICE void store(int tile, const float (&sums)[2][kNt][4]) const {
    const int row_tile = tile / p.schedule.token_tiles;
    const int token_tile = tile - row_tile * p.schedule.token_tiles;
    const int n = (row_tile * Shape::warps + warp) * kWarpRows + lane_row(at.g);
    if (n >= p.n) return;
    float bias[4] = {};
    if (p.bias) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i < p.n) bias[i] = load_bias(p.bias, p.bias_type, n + i);
      }
    }
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int m = token_tile * Shape::tokens + kTokens * j + 2 * at.t + e;
        if (m >= p.m) continue;
        const Floats4 v = four_rows(sums, j, e);
        uint16_t* const to = p.y + m * p.y_stride + n;
        uint16_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = round_to<T>(v.f[i] + bias[i]);
        if (p.y_aligned && n + 4 <= p.n) {
          store_global(reinterpret_cast<uint64_t*>(to), bits[0] |
                                                            static_cast<uint64_t>(bits[1]) << 16 |
                                                            static_cast<uint64_t>(bits[2]) << 32 |
                                                            static_cast<uint64_t>(bits[3]) << 48);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (n + i < p.n) store_global(to + i, bits[i]);
          }
        }
      }
    }
  }

  // The end of this block's part of a tile: alone it stores y; otherwise it leaves its sums behind,
  // and whoever comes last adds all of them, first k first.
  NB_DEVICE void finish(int tile, float (&sums)[2][kNt][4]) const {
    const Sharers who = sharers(p.schedule, tile);
    if (who.first == who.last) {
      store(tile, sums);
      return;
    }
    constexpr int kSlot = Shape::slot_floats / 4;
    Floats4* const own = p.partials + partial_slot(p.schedule, block, tile) * kSlot + thread;
#pragma unroll
    for (int i = 0; i < 2 * kNt; ++i) {
      store_global(own + i * Shape::threads, four_rows(sums, i >> 1, i & 1));
    }
    fence();
    sync_block();
    if (thread == 0) {
      const int before = count_arrival(p.counters + tile);
      const uint32_t last = before == who.last - who.first;
      if (last) store_global(p.counters + tile, 0);  // ready for the next launch
      store_shared(shared + Shape::flag_at, last);
    }
    sync_block();
    if (!load_shared<uint32_t>(shared + Shape::flag_at)) return;
    fence();
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[u][j][e] = 0.0f;
      }
    }
    for (int b = who.first; b <= who.last; ++b) {
      const Floats4* const from = p.partials + partial_slot(p.schedule, b, tile) * kSlot + thread;
#pragma unroll
      for (int i = 0; i < 2 * kNt; ++i) {
        const Floats4 v = load_others(from + i * Shape::threads);
#pragma unroll
        for (int row = 0; row < 4; ++row)
          sums[row >> 1][i >> 1][2 * (row & 1) + (i & 1)] += v.f[row];
      }
    }
    store(tile, sums);
  }

  NB_DEVICE void run() {
    const int chunks = p.schedule.chunks;
    const int64_t begin = first_unit(p.schedule, block);
    const int count = static_cast<int>(first_unit(p.schedule, block + 1) - begin);
    Cursor next = cursor_at(p.schedule, begin);
    Cursor now = next;
    // A group of copies is committed for each unit, empty ones too: so the number of groups in
    // flight is a constant.
    for (int i = 0; i < Shape::stages - 1; ++i) {
      if (i < count) {
        fetch(next, i);
        advance(next, chunks);
      }
      commit_copies();
    }
    float sums[2][kNt][4] = {};
    Blocks blocks = {0, 0, -1, 0};
    int stage = 0, free_stage = Shape::stages - 1;
    for (int i = 0; i < count; ++i) {
      wait_copies<Shape::stages - 2>();
      sync_block();  // all copies of this stage are seen, and nobody reads the stage before it
      if (i + Shape::stages - 1 < count) {
        fetch(next, free_stage);
        advance(next, chunks);
      }
      commit_copies();
      if constexpr (Shape::adapter) {
        if (i == 0 || now.chunk == 0) seek(blocks, now);
      }
      compute(stage, now, blocks, sums);
      if (now.chunk == chunks - 1 || i == count - 1) {
        finish(now.tile, sums);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int j = 0; j < kNt; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[u][j][e] = 0.0f;
          }
        }
      }
      advance(now, chunks);
      free_stage = stage;
      stage = stage + 1 == Shape::stages ? 0 : stage + 1;
    }
  }
};

template <class T, class Shape>
NB_DEVICE void decode_body(const DecodeParams& p, uint8_t* shared, int block, int thread,
                           uint64_t policy) {
  const int lane = thread & 31;
  Decode<T, Shape> d{p, shared, block, thread, thread >> 5, lane, lane_of(lane), policy};
  d.run();
}

}  // namespace cuda
}  // namespace nibblock
