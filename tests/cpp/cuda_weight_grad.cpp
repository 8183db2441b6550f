// The block_weight_grad kernel's body for CUDA over the software model of
// csrc/common/cuda_emulation.h, and its maps, as a library that tests/test_cuda_weight_grad.py
// compiles and calls.
#define NIBBLOCK_EMULATE_CUDA
#include "../../csrc/block_sparse_linear/cuda_weight_grad_body.cuh"

using namespace nibblock;
using namespace nibblock::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void allow(const void* p, int64_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  emulation::machine().ranges.push_back({at, at + bytes});
}

template <class T, class Shape>
void run(GradParams& p, const int32_t* order) {
  p.runs = (p.count + Shape::run - 1) / Shape::run;
  std::vector<int32_t> counters(p.runs, 0);
  std::vector<Floats4> partials(static_cast<size_t>(p.split.parts) * p.runs * Shape::slot,
                                Floats4{{NAN, NAN, NAN, NAN}});
  p.counters = counters.data();
  p.partials = partials.data();
  allow(counters.data(), 4 * static_cast<int64_t>(counters.size()));
  allow(partials.data(), 16 * static_cast<int64_t>(partials.size()));
  for (int i = 0; i < p.runs * p.split.parts; ++i) {
    const int block = order ? order[i] : i;
    emulation::run_block(Shape::threads, kGradSharedBytes, [&](int thread) {
      weight_grad_body<T, Shape>(p, emulation::machine().shared, block, thread);
    });
  }
  for (int32_t c : counters) {
    if (c != 0) emulation::fail("arrival counters were not left at zero");
  }
}

template <class T>
void run_block(GradParams& p, int64_t block, const int32_t* order) {
  if (block == 32) run<T, GradShape<32>>(p, order);
  if (block == 64) run<T, GradShape<64>>(p, order);
  if (block == 128) run<T, GradShape<128>>(p, order);
}

int run_of(int64_t block) { return static_cast<int>(kGradColumns / block); }

}  // namespace

// One launch. type: 1 bfloat16, 2 float16. parts: of the tokens, or 0 for as many as the launcher
// takes. order: of the thread blocks, or null. found[0..3]: loads, their extra wavefronts,
// products, parts.
EXPORT void cuda_weight_grad_run(int64_t m, int64_t n, int64_t k, int64_t block, int64_t count,
                                 const uint16_t* g, int64_t g_stride, const uint16_t* x,
                                 int64_t x_stride, int type, void* out, int out_type,
                                 const int32_t* row_ptr, const int32_t* col, int parts,
                                 const int32_t* order, int64_t* found) {
  GradParams p = {};
  p.g = g;
  p.x = x;
  p.g_stride = g_stride;
  p.x_stride = x_stride;
  p.out = out;
  p.row_ptr = row_ptr;
  p.col = col;
  p.m = static_cast<int32_t>(m);
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.count = static_cast<int32_t>(count);
  p.block_rows = static_cast<int32_t>((n + block - 1) / block);
  p.g_aligned = reinterpret_cast<uintptr_t>(g) % 16 == 0 && g_stride % 8 == 0;
  p.x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0;
  p.out_type = out_type;
  p.split = grad_split((count + run_of(block) - 1) / run_of(block), m);
  if (parts > 0) {
    const int tokens = static_cast<int>((m + parts - 1) / parts + kGradTokens - 1) / kGradTokens;
    p.split = {parts, tokens * kGradTokens};
  }
  emulation::Machine& machine = emulation::machine();
  machine.ranges.clear();
  machine.loads = machine.extra_wavefronts = machine.products = 0;
  for (int64_t i = 0; i < m; ++i) {
    allow(g + i * g_stride, 2 * n);
    allow(x + i * x_stride, 2 * k);
  }
  allow(out, count * block * block * (out_type == 0 ? 4 : 2));
  allow(row_ptr, 4 * (p.block_rows + 1));
  allow(col, 4 * count);
  if (type == 1) {
    run_block<BFloat16>(p, block, order);
  } else {
    run_block<Float16>(p, block, order);
  }
  found[0] = machine.loads;
  found[1] = machine.extra_wavefronts;
  found[2] = machine.products;
  found[3] = p.split.parts;
}

// --- maps ----------------------------------------------------------------------------------------

EXPORT void cuda_grad_split(int64_t runs, int64_t m, int32_t* split) {
  const GradSplit s = grad_split(runs, m);
  split[0] = s.parts;
  split[1] = s.tokens;
}

EXPORT int cuda_grad_place(int token, int unit) { return grad_place(token, unit); }
EXPORT int cuda_grad_shared_bytes() { return kGradSharedBytes; }

// seen[run][B][B] of one thread block: which warps' tiles cover an entry. Returns the threads.
template <int kBlock>
static int tiles(int32_t* seen) {
  using Shape = GradShape<kBlock>;
  for (int warp = 0; warp < Shape::warps; ++warp) {
    const GradTile t = grad_tile<Shape>(warp);
    for (int n = t.n; n < t.n + 16 * Shape::n_tiles; ++n) {
      for (int k = t.k; k < t.k + 16 * Shape::k_pairs; ++k) {
        ++seen[(t.local * kBlock + n) * kBlock + k];
      }
    }
  }
  return Shape::threads;
}
EXPORT int cuda_grad_tiles(int block, int32_t* seen) {
  return block == 32 ? tiles<32>(seen) : block == 64 ? tiles<64>(seen) : tiles<128>(seen);
}

// One load_transposed of a warp from an 8-bit numbered stage: out[32][4] of what each lane holds.
EXPORT void cuda_load_transposed(int side, uint32_t* out) {
  emulation::machine().ranges.clear();
  emulation::run_block(32, 16 * 16 * 16, [&](int thread) {
    uint8_t* const shared = emulation::machine().shared;
    for (int unit = thread; unit < 16 * 16; unit += 32) {
      Words4 v;
      const int token = unit / 16;
      for (int i = 0; i < 8; i += 2) {
        const uint32_t value = 256 * token + 8 * (unit % 16) + i;
        v.w[i / 2] = value | (value + 1) << 16;
      }
      store_shared(shared + grad_place(token, unit % 16), v);
    }
    sync_block();
    const GradRow r = side == 0 ? grad_row_n(thread) : grad_row_k(thread);
    uint32_t got[4];
    load_transposed(shared + grad_place(r.token, r.unit), got);
    for (int i = 0; i < 4; ++i) out[4 * thread + i] = got[i];
  });
}

// Misuses that the model must answer by aborting (run in a child process).
EXPORT void cuda_grad_misuse(int which) {
  emulation::machine().ranges.clear();
  emulation::run_block(64, 4096, [&](int thread) {
    uint8_t* const shared = emulation::machine().shared;
    uint32_t got[4];
    if (which == 0) load_transposed(shared + 16 * thread, got);  // never written
    store_shared(shared + 16 * thread, Words4{{0, 0, 0, 0}});
    sync_block();
    if (which == 1) {  // no barrier between one warp's load and the other's store
      load_transposed(shared + 16 * (thread ^ 32), got);
      store_shared(shared + 16 * thread, Words4{{1, 1, 1, 1}});
    }
    if (which == 2) load_transposed(shared + 16 * thread + 8, got);
    if (which == 3) load_transposed(shared + 4096 + 16 * thread, got);
  });
}
