// The CUDA decode kernel's body over the software model of csrc/common/cuda_emulation.h, and its
// layout maps, as a library that tests/test_cuda_decode.py compiles and calls.
#define NIBBLOCK_EMULATE_CUDA
#include "../../csrc/int4_linear/cuda_decode_body.cuh"
#include "../../csrc/int4_linear/cuda_weight.h"
#include "../../csrc/int4_linear/int4_linear.h"

using namespace nibblock;
using namespace nibblock::cuda;

namespace {

struct Call {
  DecodeParams p;
  const int32_t* order;  // in which `asked` blocks run; those that found no unit are left out
  int asked;
};

template <class T, class Shape>
void run(const Call& call) {
  for (int i = 0; i < call.asked; ++i) {
    const int block = call.order[i];
    if (block >= call.p.schedule.blocks) continue;
    emulation::run_block(Shape::threads, Shape::shared_bytes, [&](int thread) {
      decode_body<T, Shape>(call.p, emulation::machine().shared, block, thread, once_policy());
    });
  }
}

template <class T, int kNt>
void run_format(const Call& call, int bits, bool affine) {
  if constexpr (kNt <= 4) {
    if (call.p.values) {
      affine ? run<T, DecodeShape<kNt, 4, true, true>>(call)
             : run<T, DecodeShape<kNt, 4, false, true>>(call);
      return;
    }
  }
  if (bits == 4) {
    affine ? run<T, DecodeShape<kNt, 4, true>>(call) : run<T, DecodeShape<kNt, 4, false>>(call);
  } else {
    affine ? run<T, DecodeShape<kNt, 8, true>>(call) : run<T, DecodeShape<kNt, 8, false>>(call);
  }
}

template <class T>
void run_type(const Call& call, int nt, int bits, bool affine) {
  if (nt == 1) run_format<T, 1>(call, bits, affine);
  if (nt == 2) run_format<T, 2>(call, bits, affine);
  if (nt == 4) run_format<T, 4>(call, bits, affine);
  if (nt == 8) run_format<T, 8>(call, bits, affine);
}

void allow(const void* p, int64_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  emulation::machine().ranges.push_back({at, at + bytes});
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// One launch. type: 1 bfloat16, 2 float16. nt: token tiles of 8. blocks: of the persistent grid; at
// most one for each unit. order[blocks]. found[0..2]: warp-wide loads from shared memory, their
// extra wavefronts, products. Returns the number of units, or -1 if counters were not left at zero.
EXPORT int64_t cuda_decode_run(int64_t n, int64_t k, int64_t group, int bits, int affine,
                               int scale_type, const uint8_t* packed, int64_t m, const uint16_t* x,
                               int64_t x_stride, uint16_t* y, int64_t y_stride, int type,
                               const void* bias, int bias_type, int nt, int blocks,
                               const int32_t* order, int64_t* found, const void* values,
                               int value_type, const int32_t* row_ptr, const int32_t* col,
                               int64_t edge) {
  const Int4Format f = {n, k, group, bits, affine, static_cast<Dtype>(scale_type)};
  const Int4Geometry g = int4_geometry(f);
  const int rows = kWarpRows * (nt <= 2 ? 4 : 8);
  Call call = {};
  call.order = order;
  call.asked = blocks;
  DecodeParams& p = call.p;
  p.packed = packed;
  p.x = x;
  p.y = y;
  p.bias = bias;
  set_weight(f, &p);
  p.x_stride = x_stride;
  p.y_stride = y_stride;
  p.m = static_cast<int32_t>(m);
  p.bias_type = bias_type;
  p.x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0;
  p.y_aligned = reinterpret_cast<uintptr_t>(y) % 8 == 0 && y_stride % 4 == 0;
  p.values = values;
  p.value_type = value_type;
  p.row_ptr = row_ptr;
  p.col = col;
  p.block_shift = edge == 128 ? 7 : edge == 64 ? 6 : 5;
  Schedule& s = p.schedule;
  s.chunks = static_cast<int32_t>(k > 0 ? ceil_div(g.k_pad, kStageK) : 1);
  s.token_tiles = static_cast<int32_t>(ceil_div(m, kTokens * nt));
  s.tiles = static_cast<int32_t>(ceil_div(n, rows)) * s.token_tiles;
  s.blocks = blocks < units(s) ? blocks : static_cast<int>(units(s));
  std::vector<int32_t> counters(s.tiles, 0);
  std::vector<Floats4> partials(2 * static_cast<size_t>(s.blocks) * rows * 2 * nt,
                                Floats4{{NAN, NAN, NAN, NAN}});
  p.counters = counters.data();
  p.partials = partials.data();
  emulation::Machine& machine = emulation::machine();
  machine.ranges.clear();
  machine.loads = machine.extra_wavefronts = machine.products = 0;
  allow(packed, g.bytes);
  allow(x, ((m - 1) * x_stride + k) * 2);
  for (int64_t i = 0; i < m; ++i) allow(y + i * y_stride, 2 * n);
  if (values) {
    const int64_t rows_of_blocks = ceil_div(n, edge), count = row_ptr[rows_of_blocks];
    allow(values, count * edge * edge * dtype_size(static_cast<Dtype>(value_type)));
    allow(row_ptr, 4 * (rows_of_blocks + 1));
    allow(col, 4 * count);
  }
  if (bias) allow(bias, n * (bias_type == 0 ? 4 : 2));
  allow(counters.data(), 4 * s.tiles);
  allow(partials.data(), 16 * static_cast<int64_t>(partials.size()));
  if (type == 1) {
    run_type<BFloat16>(call, nt, bits, affine != 0);
  } else {
    run_type<Float16>(call, nt, bits, affine != 0);
  }
  found[0] = machine.loads;
  found[1] = machine.extra_wavefronts;
  found[2] = machine.products;
  for (int32_t c : counters) {
    if (c != 0) return -1;
  }
  return units(s);
}

// The maps of cuda_decode.h, for exhaustive checks.
EXPORT int cuda_slot_row(int u, int slot) { return slot_row(u, slot); }
EXPORT int cuda_column_k(int i, int column) { return column_k(i, column); }
EXPORT int64_t cuda_weight_byte(int halves, int line_k, int half, int g) {
  return weight_byte(halves, line_k, half, g);
}
EXPORT int cuda_code_byte(int bits, int k, int row) {
  const CodePlace c = code_place(bits, k, row);
  return static_cast<int>(c.byte) * 8 + c.shift;  // in bits
}
EXPORT int cuda_x_place(int token, int unit) { return x_place(token, unit); }

// first[blocks + 1], who[2 * tiles], slots[2 * tiles] of the first and last sharer.
EXPORT void cuda_schedule(int chunks, int tiles, int blocks, int64_t* first, int32_t* owners,
                          int32_t* who, int64_t* slots) {
  const Schedule s = {chunks, 1, tiles, blocks};
  for (int b = 0; b <= blocks; ++b) first[b] = first_unit(s, b);
  for (int64_t u = 0; u < units(s); ++u) owners[u] = owner(s, u);
  for (int t = 0; t < tiles; ++t) {
    const Sharers w = sharers(s, t);
    who[2 * t] = w.first;
    who[2 * t + 1] = w.last;
    slots[2 * t] = partial_slot(s, w.first, t);
    slots[2 * t + 1] = partial_slot(s, w.last, t);
  }
}

// Shared memory of a kernel, in bytes.
EXPORT int cuda_shared_bytes(int nt, int bits, int affine) {
  int bytes = 0;
  const auto take = [&](auto shape) {
    using Shape = decltype(shape);
    if (Shape::nt == nt && Shape::bits == bits && Shape::affine == (affine != 0)) {
      bytes = Shape::shared_bytes;
    }
  };
  const auto formats = [&](auto one, auto two, auto three, auto four) {
    take(one), take(two), take(three), take(four);
  };
  formats(DecodeShape<1, 4, false>(), DecodeShape<1, 4, true>(), DecodeShape<1, 8, false>(),
          DecodeShape<1, 8, true>());
  formats(DecodeShape<2, 4, false>(), DecodeShape<2, 4, true>(), DecodeShape<2, 8, false>(),
          DecodeShape<2, 8, true>());
  formats(DecodeShape<4, 4, false>(), DecodeShape<4, 4, true>(), DecodeShape<4, 8, false>(),
          DecodeShape<4, 8, true>());
  formats(DecodeShape<8, 4, false>(), DecodeShape<8, 4, true>(), DecodeShape<8, 8, false>(),
          DecodeShape<8, 8, true>());
  return bytes;
}

// Misuses, one each, that the model must answer by aborting (run in a child process). Returns the
// extra wavefronts of a block that does nothing wrong but meets one bank with every lane.
EXPORT int64_t cuda_misuse(int which) {
  alignas(16) static uint8_t global[64 * 16];
  emulation::machine().ranges.clear();
  allow(global, sizeof(global));
  emulation::machine().extra_wavefronts = 0;
  emulation::run_block(64, 8192, [&](int thread) {
    uint8_t* const shared = emulation::machine().shared;
    uint8_t* const own = shared + 16 * thread;
    const uint8_t* const from = global + 16 * thread + (which == 0 ? 16 : 0);
    copy_async_16(own, from + (which == 1 ? 8 : 0), which == 1 ? 8 : 16);
    commit_copies();
    if (which != 2) wait_copies<0>();
    if (which == 3 && thread % 2) load_shared<uint32_t>(shared + 16 * (thread ^ 1));
    if (which == 4 && thread == 5) return;
    sync_block();
    load_shared<uint32_t>(shared + 16 * (thread ^ 1));
    if (which == 5 && thread % 2) store_shared<uint32_t>(own, 1);
    sync_block();
    if (which == 6) load_shared<uint32_t>(shared + 4096);
    if (which == 7) store_shared<uint32_t>(shared + 8192, 1);
    if (which == 8) fma_pair<BFloat16>(0x3f803f80u, 0x3f803f80u, 0x3b803b80u);  // 1 + 2^-8
    if (which == 9) load_global(reinterpret_cast<const uint16_t*>(global + 1));
    store_shared<uint32_t>(shared + 128 * (thread & 31) + 64 * (thread >> 5), 1);
    sync_block();
    load_shared<uint32_t>(shared + 128 * (thread & 31) + 64 * (thread >> 5));
  });
  return emulation::machine().extra_wavefronts;
}
