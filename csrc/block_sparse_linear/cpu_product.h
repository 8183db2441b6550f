// block_sparse_linear and its input gradient for AVX2 and AVX-512.
//
// A task is a chunk of rows times a run of output blocks that hold about equally many stored
// blocks. The chunk is chosen so that its packed x stays in L2 (kChunkBytes): every output block
// reads all of it again, 4 bytes a cycle beside the FMAs of a 32 x 32 block. With enough rows a
// task has a chunk to itself and packs it into its own scratch; with fewer all threads pack first
// and then share. Laying out a 32 x 32 block costs about 300 cycles against 32 cycles for each row
// of its product.
#pragma once

#include "cpu_pieces.h"

namespace nibblock {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;
constexpr int64_t kChunkRows = 480;
constexpr int64_t kStoreColumns = 128;
constexpr int64_t kSerialWork =
    1 << 17;  // multiply-adds below which waking threads costs more than it saves

// First output block of part i of `parts`: equal shares of blocks + 1 (the way out costs about a
// block).
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

// Output blocks [u0, u1) of rows [r0, r0 + rows), kStoreColumns at a time: strips of y of one
// 32-wide block would be one cache line a row.
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
                                   acc + c, kStoreColumns)) {
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

// Cuts a call into tasks. pack(x, tile) packs one tile of H rows (`tile_bytes`); multiply(x, r0,
// rows, u0, u1, scratch) does rows [r0, r0 + rows) of x times output blocks [u0, u1).
template <class Pack, class Multiply>
static Status run_chunks(const BlockSparseParams& p, const Parallel& parallel, const Walk& walk,
                         int64_t H, int64_t tile_bytes, int64_t scratch_bytes, Pack pack,
                         Multiply multiply) {
  const int64_t threads = max64(1, parallel.threads);
  const int64_t tiles = ceil_div(p.m, H);
  const int64_t most = max64(4, min64(kChunkRows / H, kChunkBytes / max64(1, tile_bytes)));
  int64_t chunks = ceil_div(tiles, most);
  const bool own = chunks >= threads;  // a chunk belongs to one task
  if (own) chunks = min64(tiles, round_up(chunks, threads));
  const int64_t groups = own ? 1 : min64(walk.outs, threads);
  const int64_t chunk_tiles = ceil_div(tiles, chunks);

  char* shared = nullptr;
  const int64_t x_bytes = (own ? chunk_tiles : tiles) * tile_bytes;
  if (!own) {
    shared = static_cast<char*>(aligned_malloc(x_bytes));
    if (!shared) return kOutOfMemory;
    const PackedRows x = {shared, 0, p.m, tiles};
    auto pack_all = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) pack(x, t);
    };
    parallel_for(parallel, tiles, pack_all);
  }
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t fixed = round_up(scratch_bytes + chunk_tiles * H * kStoreColumns * 4, 64);
    char* memory = static_cast<char*>(aligned_malloc(fixed + (own ? x_bytes : 0)));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / groups, group = task % groups;
      const int64_t r0 = tiles * chunk / chunks * H;
      const int64_t r1 = min64(p.m, tiles * (chunk + 1) / chunks * H);
      PackedRows x = {shared, 0, p.m, tiles};
      if (own) {
        x = {memory + fixed, r0, r1 - r0, chunk_tiles};
        for (int64_t t = 0; t < ceil_div(r1 - r0, H); ++t) pack(x, t);
      }
      multiply(x, r0 - x.m0, r1 - r0, balanced(walk, groups, group),
               balanced(walk, groups, group + 1), memory);
    }
    free(memory);
  };
  parallel_for(parallel, chunks * groups, body);
  free(shared);
  return failed ? kOutOfMemory : kOk;
}

static inline const Parallel& worth_threads(const BlockSparseParams& p, const Walk& walk) {
  const int64_t work = p.m * (p.s.count * p.s.block * p.s.block + walk.out_size);
  return work < kSerialWork ? kSerial : *p.parallel;
}

template <class O, int B>
static Status product_of(const BlockSparseParams& p, bool dx) {
  using S = Shape<O, B>;
  const Walk walk = make_walk(p.s, dx);
  constexpr int64_t kPanels = S::kPass * S::kPanelFloats;
  return run_chunks(
      p, worth_threads(p, walk), walk, S::kRows, walk.ins * S::kRows * B * 4, kPanels * 4,
      [&](const PackedRows& x, int64_t t) {
        pack_tile<O, B>(walk, p.x, p.xtype, p.x_stride, x, t);
      },
      [&](const PackedRows& x, int64_t r0, int64_t rows, int64_t u0, int64_t u1, void* scratch) {
        float* w = static_cast<float*>(scratch);
        multiply_chunk<O, B>(p, walk, x, r0, rows, u0, u1, w, w + kPanels);
      });
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
