// The block_weight_grad kernel's body, one thread's view. cuda_weight_grad.h draws the places;
// cuda_common.cuh and cuda_matrix.cuh hold the instructions.
#pragma once

#include "../common/cuda_matrix.cuh"
#include "cuda_weight_grad.h"

namespace nibblock {
namespace cuda {

struct GradParams {
  const uint16_t *g, *x;       // [m, n], [m, k] of the kernel's 16-bit type
  int64_t g_stride, x_stride;  // elements
  void* out;                   // [count][B][B] out_type, begins at a multiple of 16
  Floats4* partials;           // parts * runs slots, or null with one part
  int32_t* counters;           // one for each run, zero before and after
  const int32_t* row_ptr;      // [block_rows + 1]
  const int32_t* col;          // [count]
  int32_t m, n, k, count, block_rows, runs;
  int32_t g_aligned, x_aligned;  // the operand and its row stride are multiples of 16 bytes
  int32_t out_type;              // 0 float32, 1 bfloat16, 2 float16
  GradSplit split;
};

template <class T, class Shape>
struct WeightGrad {
  static constexpr int kB = Shape::block;

  const GradParams& p;
  uint8_t* shared;
  int run, part, thread, warp, lane;

  // 8 columns of one token, zeros outside the operand.
  static NB_DEVICE void fetch_unit(uint8_t* place, const uint16_t* rows, int64_t stride,
                                   bool aligned, int m, int end, int64_t column, int width) {
    const int64_t left = m < end && column >= 0 ? width - column : 0;
    const int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
    const uint16_t* const from = rows + (count > 0 ? m * stride + column : 0);
    if (aligned) {
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

  // Begins the copies of 32 tokens from m0 on. Every unit of x, and of g those of the run's block
  // rows.
  NB_DEVICE void fetch(int stage, int m0, int end, const int (&rows)[Shape::run], int distinct,
                       const int (&columns)[Shape::run]) const {
    uint8_t* const base = shared + stage * 2 * kGradOperand;
    constexpr int kUnits = kGradTokens * kGradUnits;
#pragma unroll
    for (int first = 0; first < kUnits; first += Shape::threads) {
      const int token = (first + thread) / kGradUnits, unit = (first + thread) % kGradUnits;
      const int slot = 8 * unit / kB;
      int row = 0, column = 0;
#pragma unroll
      for (int i = 0; i < Shape::run; ++i) {
        row = slot == i ? rows[i] : row;
        column = slot == i ? columns[i] : column;
      }
      const int inside = 8 * unit % kB;
      // A block that is not there is asked for at column -1: zeros.
      fetch_unit(base + grad_place(token, unit), p.x, p.x_stride, p.x_aligned, m0 + token, end,
                 column < 0 ? -1 : static_cast<int64_t>(column) * kB + inside, p.k);
      if (slot < distinct) {
        fetch_unit(base + kGradOperand + grad_place(token, unit), p.g, p.g_stride, p.g_aligned,
                   m0 + token, end, row < 0 ? -1 : static_cast<int64_t>(row) * kB + inside, p.n);
      }
    }
  }

  // The block rows of the run, by a look of every thread at its share of row_ptr; -1: none.
  NB_DEVICE void find_rows(int (&rows)[Shape::run]) const {
    if (thread < Shape::run) store_shared<int32_t>(shared + kGradRows + 4 * thread, -1);
    sync_block();
    const int z0 = run * Shape::run;
    for (int row = thread; row < p.block_rows; row += Shape::threads) {
      const int begin = load_global(p.row_ptr + row), end = load_global(p.row_ptr + row + 1);
#pragma unroll
      for (int i = 0; i < Shape::run; ++i) {
        if (z0 + i >= begin && z0 + i < end && z0 + i < p.count) {
          store_shared<int32_t>(shared + kGradRows + 4 * i, row);
        }
      }
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < Shape::run; ++i) {
      rows[i] = load_shared<int32_t>(shared + kGradRows + 4 * i);
    }
  }

  // One stage: two products deep. slot: which of the stage's block rows the warp's block has.
  NB_DEVICE void compute(int stage, const GradTile& at, int slot,
                         float (&sums)[Shape::n_tiles][2 * Shape::k_pairs][4]) const {
    const uint8_t* const x = shared + stage * 2 * kGradOperand;
    const uint8_t* const g = x + kGradOperand;
    const GradRow rn = grad_row_n(lane), rk = grad_row_k(lane);
    const int unit_n = (slot * kB + at.n) / 8 + rn.unit;
    const int unit_k = (at.local * kB + at.k) / 8 + rk.unit;
#pragma unroll
    for (int step = 0; step < kGradTokens; step += 16) {
      uint32_t left[Shape::n_tiles][4], right[Shape::k_pairs][4];
#pragma unroll
      for (int i = 0; i < Shape::n_tiles; ++i) {
        load_transposed(g + grad_place(step + rn.token, unit_n + 2 * i), left[i]);
      }
#pragma unroll
      for (int j = 0; j < Shape::k_pairs; ++j) {
        load_transposed(x + grad_place(step + rk.token, unit_k + 2 * j), right[j]);
      }
#pragma unroll
      for (int i = 0; i < Shape::n_tiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * Shape::k_pairs; ++j) {
          multiply_add_tile<T>(sums[i][j], left[i], right[j / 2][2 * (j & 1)],
                               right[j / 2][2 * (j & 1) + 1]);
        }
      }
    }
  }

  // Two neighbouring k of one n, zeros outside [N, K].
  NB_DEVICE void store_pair(int z, int row, int column, int n, int k, float a, float b) const {
    const bool in_n = static_cast<int64_t>(row) * kB + n < p.n;
    const int64_t at_k = static_cast<int64_t>(column) * kB + k;
    a = in_n && at_k < p.k ? a : 0.0f;
    b = in_n && at_k + 1 < p.k ? b : 0.0f;
    const int64_t at = (static_cast<int64_t>(z) * kB + n) * kB + k;
    if (p.out_type == 0) {
      uint32_t low, high;
      memcpy(&low, &a, 4);
      memcpy(&high, &b, 4);
      store_global(reinterpret_cast<uint64_t*>(static_cast<float*>(p.out) + at),
                   low | static_cast<uint64_t>(high) << 32);
    } else {
      const uint32_t low = p.out_type == 1 ? round_to<BFloat16>(a) : round_to<Float16>(a);
      const uint32_t high = p.out_type == 1 ? round_to<BFloat16>(b) : round_to<Float16>(b);
      store_global(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at),
                   low | high << 16);
    }
  }

  // With several parts: leaves this one's sums behind; true for whoever comes last, who then holds
  // the sum of all, first tokens first.
  NB_DEVICE bool gather(float (&sums)[Shape::n_tiles][2 * Shape::k_pairs][4]) const {
    const auto slot_of = [&](int which) {
      return p.partials + (static_cast<int64_t>(which) * p.runs + run) * Shape::slot + thread;
    };
    Floats4* const own = slot_of(part);
#pragma unroll
    for (int i = 0; i < Shape::sums; ++i) {
      const float (&s)[4] = sums[i / (2 * Shape::k_pairs)][i % (2 * Shape::k_pairs)];
      store_global(own + i * Shape::threads, Floats4{{s[0], s[1], s[2], s[3]}});
    }
    fence();
    sync_block();
    if (thread == 0) {
      const uint32_t last = count_arrival(p.counters + run) == p.split.parts - 1;
      if (last) store_global(p.counters + run, 0);  // ready for the next launch
      store_shared(shared + kGradFlag, last);
    }
    sync_block();
    if (!load_shared<uint32_t>(shared + kGradFlag)) return false;
    fence();
#pragma unroll
    for (int i = 0; i < Shape::sums; ++i) {
      float (&s)[4] = sums[i / (2 * Shape::k_pairs)][i % (2 * Shape::k_pairs)];
#pragma unroll
      for (int e = 0; e < 4; ++e) s[e] = 0.0f;
    }
    for (int which = 0; which < p.split.parts; ++which) {
      const Floats4* const from = slot_of(which);
#pragma unroll
      for (int i = 0; i < Shape::sums; ++i) {
        const Floats4 v = load_others(from + i * Shape::threads);
        float (&s)[4] = sums[i / (2 * Shape::k_pairs)][i % (2 * Shape::k_pairs)];
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] += v.f[e];
      }
    }
    return true;
  }

  NB_DEVICE void go() {
    int rows[Shape::run], columns[Shape::run], slots[Shape::run];
    find_rows(rows);
    // Neighbours of one block row share a slot of the stage: slot s holds the row at[s].
    int at[Shape::run];
    int distinct = 0;
#pragma unroll
    for (int i = 0; i < Shape::run; ++i) {
      const int z = run * Shape::run + i;
      columns[i] = z < p.count ? load_global(p.col + z) : -1;
      at[i] = -1;
      if (i == 0 || rows[i] != rows[i - 1]) ++distinct;
      slots[i] = distinct - 1;
#pragma unroll
      for (int s = 0; s < Shape::run; ++s) {
        if (s <= i && s == slots[i]) at[s] = rows[i];
      }
    }
    const GradTile tile = grad_tile<Shape>(warp);
    int row = -1, column = -1, slot = 0;
#pragma unroll
    for (int i = 0; i < Shape::run; ++i) {
      row = i == tile.local ? rows[i] : row;
      column = i == tile.local ? columns[i] : column;
      slot = i == tile.local ? slots[i] : slot;
    }
    const int begin = part * p.split.tokens;
    const int end = p.m - begin < p.split.tokens ? p.m : begin + p.split.tokens;
    const int steps = end > begin ? (end - begin + kGradTokens - 1) / kGradTokens : 0;
    // A group of copies is committed for each stage, empty ones too: so the number of groups in
    // flight is a constant.
    for (int i = 0; i < kGradStages - 1; ++i) {
      if (i < steps) fetch(i, begin + i * kGradTokens, end, at, distinct, columns);
      commit_copies();
    }
    float sums[Shape::n_tiles][2 * Shape::k_pairs][4] = {};
    int stage = 0, free_stage = kGradStages - 1;
    for (int i = 0; i < steps; ++i) {
      wait_copies<kGradStages - 2>();
      sync_block();  // all copies of this stage are seen, and nobody reads the stage before it
      const int ahead = i + kGradStages - 1;
      if (ahead < steps) {
        fetch(free_stage, begin + ahead * kGradTokens, end, at, distinct, columns);
      }
      commit_copies();
      sync_warp();  // fetch branches by lane
      compute(stage, tile, slot, sums);
      free_stage = stage;
      stage = stage + 1 == kGradStages ? 0 : stage + 1;
    }
    if (p.split.parts > 1 && !gather(sums)) return;
    const int z = run * Shape::run + tile.local;
    if (z >= p.count || row < 0) return;
    const int first_n = tile.n + (lane >> 2), first_k = tile.k + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < Shape::n_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * Shape::k_pairs; ++j) {
        const float (&s)[4] = sums[i][j];
        store_pair(z, row, column, first_n + 16 * i, first_k + 8 * j, s[0], s[1]);
        store_pair(z, row, column, first_n + 16 * i + 8, first_k + 8 * j, s[2], s[3]);
      }
    }
  }
};

// block: of the grid, run by run inside a part.
template <class T, class Shape>
NB_DEVICE void weight_grad_body(const GradParams& p, uint8_t* shared, int block, int thread) {
  WeightGrad<T, Shape> w{p,      shared,      block % p.runs, block / p.runs,
                         thread, thread >> 5, thread & 31};
  w.go();
}

}  // namespace cuda
}  // namespace nibblock
