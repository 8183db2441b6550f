// block_sparse_linear and its input gradient for AVX2 and AVX-512.
//
// A task is a chunk of rows times a run of output blocks that hold about equally many stored blocks. The
// chunk is chosen so that its packed x stays in L2 (kChunkBytes): every output block reads all of it again,
// 4 bytes a cycle beside the FMAs of a 32 x 32 block. With enough rows a task has a chunk to itself and packs
// it into its own scratch; with fewer all threads pack first and then share.
// Laying out a 32 x 32 block costs about 300 cycles against 32 cycles for each row of its product.
#pragma once

#include "cpu_pieces.h"

namespace nibblock {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;
constexpr int64_t kChunkRows = 480;
constexpr int64_t kStoreColumns = 128;
constexpr int64_t kSerialWork =
    1 << 17;  // multiply-adds below which waking threads costs more than it saves

// First output block of part i of `parts`: equal shares of blocks + 1 (the way out costs about a block).
static inline int64_t balanced(const Walk& w, int64_t parts, int64_t i) {
  const int64_t want = (w.ptr[w.outs] + w.outs) * i / parts;
  int64_t low = 0, high = w.outs;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (w.ptr[mid] + mid < want) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low;
}

// bias[at .. at + W) as float32, zeros behind its end; null when there is none.
template <class O>
static inline const float* widen_bias(const BlockSparseParams& p, int64_t at, int64_t count,
                                      float* out) {
  if (!p.bias) return nullptr;
  with_type(p.bias_type, [&](auto tag, int size) {
    widen<O>(tag, size, static_cast<const char*>(p.bias) + at * size, count, out);
  });
  return out;
}

// Output blocks [u0, u1) of rows [r0, r0 + rows), kStoreColumns at a time: strips of y of one 32-wide block
// would be one cache line a row.
template <class O, int B>
static void multiply_chunk(const BlockSparseParams& p, const Walk& walk, const PackedRows& x,
                           int64_t r0, int64_t rows, int64_t u0, int64_t u1, float* w, float* acc) {
  using S = Shape<O, B>;
  const int64_t end = min64(walk.out_size, u1 * B);
  for (int64_t at = u0 * B; at < end; at += kStoreColumns) {
    const int64_t count = min64(kStoreColumns, end - at);
    bool any = false;
    for (int64_t c = 0; c < count; c += S::kWidth) {
      const int64_t u = (at + c) / B;
      any |= walk.ptr[u] != walk.ptr[u + 1];
    }
    for (int64_t c = 0; any && c < count; c += S::kWidth) {
      const int64_t u = (at + c) / B;
      if (multiply_block_row<O, B>(walk, p.values, p.vtype, u, at + c - u * B, x, r0, rows, w,
                                   acc + c, kStoreColumns, true)) {
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        memset(acc + r * kStoreColumns + c, 0, S::kWidth * sizeof(float));
    }
    if (!any) memset(acc, 0, kStoreColumns * sizeof(float));
    alignas(64) float wide[kStoreColumns];
    const float* bias = widen_bias<O>(p, at, count, wide);
    store_rows<O>(p, x.m0 + r0, rows, at, count, acc, any ? kStoreColumns : 0, bias);
  }
}

template <class O, int B>
static Status product_of(const BlockSparseParams& p, bool dx) {
  using S = Shape<O, B>;
  constexpr int H = S::kRows;
  const Walk walk = make_walk(p.s, dx);
  static const Parallel serial = {nullptr, 1};
  const Parallel& parallel =
      p.m * (p.s.count * B * B + walk.out_size) < kSerialWork ? serial : *p.parallel;
  const int64_t threads = max64(1, parallel.threads);
  const int64_t tiles = ceil_div(p.m, H), tile_floats = walk.ins * H * B;
  const int64_t most = max64(4, min64(kChunkRows / H, kChunkBytes / 4 / max64(1, tile_floats)));
  int64_t chunks = ceil_div(tiles, most);
  const bool own = chunks >= threads;  // a chunk belongs to one task
  if (own) chunks = min64(tiles, round_up(chunks, threads));
  const int64_t groups = own ? 1 : min64(walk.outs, threads);
  const int64_t chunk_tiles = ceil_div(tiles, chunks);

  float* shared = nullptr;
  const int64_t x_floats = (own ? chunk_tiles : tiles) * tile_floats;
  if (!own) {
    shared = static_cast<float*>(aligned_malloc(x_floats * 4));
    if (!shared) return kOutOfMemory;
    const PackedRows x = {shared, 0, p.m, tiles};
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) pack_tile<O, B>(walk, p.x, p.xtype, p.x_stride, x, t);
    };
    parallel_for(parallel, tiles, pack);
  }
  int failed = 0;
  auto multiply = [&](int64_t begin, int64_t end) {
    const int64_t fixed = S::kPass * S::kPanelFloats + chunk_tiles * H * kStoreColumns;
    float* w = static_cast<float*>(aligned_malloc((fixed + (own ? x_floats : 0)) * 4));
    if (!w) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    float* acc = w + S::kPass * S::kPanelFloats;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / groups, group = task % groups;
      const int64_t r0 = tiles * chunk / chunks * H,
                    r1 = min64(p.m, tiles * (chunk + 1) / chunks * H);
      PackedRows x = {shared, 0, p.m, tiles};
      if (own) {
        x = {w + fixed, r0, r1 - r0, chunk_tiles};
        for (int64_t t = 0; t < ceil_div(r1 - r0, H); ++t)
          pack_tile<O, B>(walk, p.x, p.xtype, p.x_stride, x, t);
      }
      multiply_chunk<O, B>(p, walk, x, r0 - x.m0, r1 - r0, balanced(walk, groups, group),
                           balanced(walk, groups, group + 1), w, acc);
    }
    free(w);
  };
  parallel_for(parallel, chunks * groups, multiply);
  free(shared);
  return failed ? kOutOfMemory : kOk;
}

template <class O>
static Status product(const BlockSparseParams& p, bool dx) {
  switch (p.s.block) {
  case 16:
    return product_of<O, 16>(p, dx);
  case 32:
    return product_of<O, 32>(p, dx);
  case 64:
    return product_of<O, 64>(p, dx);
  default:
    return product_of<O, 128>(p, dx);
  }
}

}  // namespace
}  // namespace nibblock
