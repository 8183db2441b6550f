// block_weight_grad on AMX bfloat16 tiles, for bfloat16 g and x.
//
// The sum runs over tokens m, 32 to a step. g is operand A, which wants rows n of 32 m: pairs of
// rows of g are interleaved and transposed; x is operand B, pairs of m: interleaved only. Both are
// made once per kTokens tokens for the column blocks that occur, (N + K) * kTokens * 2 bytes, and
// serve every block. A 32 x 32 part of a block is four accumulators, 64 cycles of TDP a step, over
// kTokens tokens 1024; loading and storing the sums takes 96. Of the operands, 4 KiB a step, g
// stays in L1 along a block row; x would come from L3, so blocks are taken by ranges of columns
// whose x fits half of L2, and within a range by rows.
//
// The sum of an output is cut at multiples of kTokens, whatever the task or thread.
#include "amx_blocks.h"

namespace nibblock {
namespace {

constexpr int64_t kTokens = 512;
constexpr int64_t kTokenSteps = kTokens / 32;
constexpr int64_t kRangeBytes = 1 << 20;

// 32 columns from `at` of tokens [m, m + 32) as operand B: two tiles (one when `cols` is 16) of 16
// pairs. Zeros outside.
static void interleave(const void* x, int64_t stride, int64_t m, int64_t tokens, int64_t at,
                       int64_t live, int tiles, uint8_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < 16; ++j) {
    const int64_t row = m + 2 * j;
    const int64_t first = row < tokens ? live : 0, second = row + 1 < tokens ? live : 0;
    const __m512i even = load_row_bf16(x, Dtype::kBF16, row * stride + at, first);
    const __m512i odd = load_row_bf16(x, Dtype::kBF16, (row + 1) * stride + at, second);
    _mm512_store_si512(out + 64 * j, _mm512_permutex2var_epi16(even, low, odd));
    if (tiles == 1) continue;
    _mm512_store_si512(out + amx::kTileBytes + 64 * j, _mm512_permutex2var_epi16(even, high, odd));
  }
}

// Column block j of tokens [m0, tokens), kTokens at most: [part of 32 columns][step][tile].
template <int B>
static void pack_tokens(const void* x, int64_t stride, int64_t size, int64_t j, int64_t m0,
                        int64_t tokens, int64_t steps, bool turned, uint8_t* out) {
  constexpr int kTiles = B < 32 ? 1 : 2;
  for (int64_t c = j * B; c < (j + 1) * B; c += 16 * kTiles) {
    for (int64_t s = 0; s < steps; ++s, out += kTiles * amx::kTileBytes) {
      const int64_t live = max64(0, min64(16 * kTiles, size - c));
      interleave(x, stride, m0 + 32 * s, tokens, c, live, kTiles, out);
      if (!turned) continue;
      compiler_barrier();
      for (int t = 0; t < kTiles; ++t) {
        __m512i rows[16];
        transpose16(out + t * amx::kTileBytes, 64, rows);
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(out + t * amx::kTileBytes + 64 * i, rows[i]);
        }
      }
    }
  }
}

// sums[B][B] += g^T x over the steps of a chunk.
template <int B>
static void grad_tiles(const uint8_t* g, const uint8_t* x, int64_t steps, float* sums) {
  constexpr bool kWide = B >= 32;
  constexpr int64_t kStep = (kWide ? 2 : 1) * amx::kTileBytes, kRow = B * 4;
  for (int n = 0; n < B; n += 32) {
    for (int k = 0; k < B; k += 32) {
      char* c = reinterpret_cast<char*>(sums + n * B + k);
      const uint8_t* a = g + n / 32 * steps * kStep;
      const uint8_t* b = x + k / 32 * steps * kStep;
      amx::load<0>(c, kRow);
      if (kWide) {
        amx::load<1>(c + 64, kRow);
        amx::load<2>(c + 16 * kRow, kRow);
        amx::load<3>(c + 16 * kRow + 64, kRow);
      }
      for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) {
        amx::load<4>(a, 64);
        amx::load<6>(b, 64);
        amx::dot_bf16<0, 4, 6>();
        if (!kWide) continue;
        amx::load<7>(b + amx::kTileBytes, 64);
        amx::dot_bf16<1, 4, 7>();
        amx::load<5>(a + amx::kTileBytes, 64);
        amx::dot_bf16<2, 5, 6>();
        amx::dot_bf16<3, 5, 7>();
      }
      amx::store<0>(c, kRow);
      if (kWide) {
        amx::store<1>(c + 64, kRow);
        amx::store<2>(c + 16 * kRow, kRow);
        amx::store<3>(c + 16 * kRow + 64, kRow);
      }
    }
  }
}

// A block's sums to its place: zeros outside the matrix, rounded.
template <int B>
static void finish(const BlockWeightGradParams& p, int64_t z, int64_t row, const float* sums) {
  const int64_t rows = min64(B, p.s.n - row * B), cols = min64(B, p.s.k - p.s.col[z] * B);
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < B; k += 16) {
      const __mmask16 live = i < rows ? mask_below(k, cols) : static_cast<__mmask16>(0);
      const __m512 v = _mm512_maskz_loadu_ps(live, sums + i * B + k);
      store_outputs(p.out, p.out_type, (z * B + i) * B + k, v, 0xffff);
    }
  }
}

template <int B>
static Status amx_grad_of(const BlockWeightGradParams& p) {
  const int64_t rows = ceil_div(p.s.n, B), cols = ceil_div(p.s.k, B), Z = p.s.count;
  const bool in_place = p.out_type == Dtype::kF32;
  const int64_t most = min64(kTokenSteps, max64(1, ceil_div(p.m, 32)));
  const int64_t block_bytes = most * 32 * B * 2, x_at = rows * block_bytes;
  const int64_t packed = (rows + cols) * block_bytes;
  char* memory = static_cast<char*>(aligned_malloc(packed + (in_place ? 0 : Z * B * B * 4)));
  if (!memory) return kOutOfMemory;
  float* sums = in_place ? static_cast<float*>(p.out) : reinterpret_cast<float*>(memory + packed);
  memset(sums, 0, static_cast<size_t>(Z * B * B) * 4);
  uint8_t* tiles = reinterpret_cast<uint8_t*>(memory);
  const int64_t range = max64(1, kRangeBytes / block_bytes);
  const Walk walk = make_walk(p.s, false);
  const int64_t parts = min64(rows, 4 * max64(1, p.parallel->threads));
  for (int64_t m = 0; m < p.m; m += most * 32) {
    const int64_t steps = min64(most, ceil_div(p.m - m, 32));
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const bool g = t < rows;
        const int64_t j = g ? t : t - rows;
        const int32_t* used = (g ? p.s.row_ptr : p.s.col_ptr) + j;
        if (used[0] == used[1]) continue;
        pack_tokens<B>(g ? p.g : p.x, g ? p.g_stride : p.x_stride, g ? p.s.n : p.s.k, j, m, p.m,
                       steps, g, tiles + t * block_bytes);
      }
    };
    parallel_for(*p.parallel, rows + cols, pack);
    auto multiply = [&](int64_t begin, int64_t end) {
      const int64_t u0 = balanced(walk, parts, begin), u1 = balanced(walk, parts, end);
      amx::configure(amx::full_tiles());
      for (int64_t c = 0; c < cols; c += range) {
        for (int64_t u = u0; u < u1; ++u) {
          int64_t low = p.s.row_ptr[u], high = p.s.row_ptr[u + 1];
          while (low < high) {  // the row's first block of this range of columns
            const int64_t mid = (low + high) / 2;
            if (p.s.col[mid] < c) {
              low = mid + 1;
            } else {
              high = mid;
            }
          }
          for (; low < p.s.row_ptr[u + 1] && p.s.col[low] < c + range; ++low) {
            grad_tiles<B>(tiles + u * block_bytes, tiles + x_at + p.s.col[low] * block_bytes, steps,
                          sums + low * B * B);
          }
        }
      }
      amx::release();
    };
    parallel_for(*p.parallel, parts, multiply);
  }
  auto round = [&](int64_t begin, int64_t end) {
    for (int64_t u = balanced(walk, parts, begin); u < balanced(walk, parts, end); ++u) {
      for (int64_t z = p.s.row_ptr[u]; z < p.s.row_ptr[u + 1]; ++z) {
        const bool ragged = (u + 1) * B > p.s.n || (p.s.col[z] + 1) * B > p.s.k;
        if (!in_place || ragged) finish<B>(p, z, u, sums + z * B * B);
      }
    }
  };
  parallel_for(*p.parallel, parts, round);
  free(memory);
  return kOk;
}

}  // namespace

Status block_weight_grad_amx(const BlockWeightGradParams& p) {
  switch (p.s.block) {
  case 16:
    return amx_grad_of<16>(p);
  case 32:
    return amx_grad_of<32>(p);
  case 64:
    return amx_grad_of<64>(p);
  default:
    return amx_grad_of<128>(p);
  }
}

}  // namespace nibblock
