// A software model of what cuda_common.cuh promises, for tests on machines without a GPU. Blocks
// run one after another; the threads of a block are fibers that give way at barriers and at tensor
// core products, so the body under test is the very source that nvcc compiles.
//
// The model is stricter than the hardware. It aborts with a sentence on:
//   - a global address outside the registered ranges, a wrong alignment, a place outside the
//     block's shared memory
//   - reading shared memory that was never written, or whose copy has not been waited for
//   - a race: two threads at one word of shared memory without a barrier between them, one of
//     which writes. An asynchronous copy writes from its start to its wait
//   - a packed 16-bit operation that is not exact (conversions of codes must be)
//   - threads that do not reach the same barriers, or wait for one another for ever
// and counts, for each warp-wide load from shared memory, the wavefronts beyond the fewest that its
// bytes need (bank conflicts).
//
// An asynchronous copy reads and writes at the wait, the latest moment the hardware may, and fails
// if its source changed in between. x86-64 only: fibers are switched by a dozen instructions.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#include "cuda_host_device.h"
#include "types.h"

#define NB_DEVICE inline

namespace nibblock {
namespace cuda {
namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulation: %s\n", what);
  abort();
}

// --- fibers --------------------------------------------------------------------------------------

extern "C" void nb_switch_fiber(void** save, void* to);
// Keeps what the System V ABI lets a callee keep, swaps stacks, returns into the other fiber.
asm(R"(
.text
.globl nb_switch_fiber
.hidden nb_switch_fiber
nb_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Word {  // one 32-bit word of shared memory, as the race check sees it
  int writer = -1, write_epoch = -1;
  int reader = -1, read_epoch = -1;  // reader -2: several
  int pending = 0;                   // copies that may still write here
  bool written = false;
};

struct Copy {
  int place, size;
  const uint8_t* from;
  int bytes;
  uint8_t seen[16];  // the source when the copy began
};

struct Access {
  int place, size;
};

struct Thread {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  bool done = false;
  int barriers = 0;
  std::vector<std::vector<Copy>> groups;  // committed, unfinished
  std::vector<Copy> open;
  std::vector<Access> loads;
  // operands of the product this thread waits in
  float* c = nullptr;
  const uint32_t* a = nullptr;
  uint32_t b[2];
};

struct Warp {
  int arrived = 0;
  int generation = 0;
};

struct Range {
  const uint8_t* begin;
  const uint8_t* end;
};

// Where a further part of the model (cuda_emulation_sm90a.h) puts its own checks in place.
struct Hooks {
  void (*read)(int place, int size) = nullptr;
  void (*write)(int place, int size) = nullptr;
  void (*sync_warp)() = nullptr;
  void (*sync_block)() = nullptr;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Range> ranges;
  std::vector<uint8_t> shared_store;
  uint8_t* shared = nullptr;
  int shared_bytes = 0;
  std::vector<Word> words;
  int epoch = 0;  // barriers passed
  int arrived = 0, alive = 0;
  int current = 0;
  void* scheduler = nullptr;
  std::function<void(int)> body;
  bool moved = false;  // a thread began, ended, or came through what it waited for
  Hooks hooks;
  int64_t loads = 0, extra_wavefronts = 0, products = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Thread& self() { return machine().threads[machine().current]; }
inline void give_way() { nb_switch_fiber(&self().stack_pointer, machine().scheduler); }

inline void fiber_main() {
  Machine& m = machine();
  m.moved = true;
  m.body(m.current);
  m.moved = true;
  Thread& t = self();
  if (!t.open.empty()) fail("copies were begun and never committed");
  t.done = true;
  if (--m.alive > 0 && m.arrived > 0) fail("a thread ended while others wait at a barrier");
  give_way();
  fail("a finished thread ran on");
}

// Words that a warp's load moves at once: 32 lanes of 4 bytes, half or a quarter of them for 8 or
// 16 bytes. Lanes of one phase that need different words of one bank wait for one another.
inline void count_conflicts() {
  Machine& m = machine();
  for (size_t first = 0; first < m.threads.size(); first += 32) {
    const size_t count = m.threads[first].loads.size();
    for (int lane = 1; lane < 32; ++lane) {
      if (m.threads[first + lane].loads.size() != count) fail("lanes load different numbers");
    }
    for (size_t i = 0; i < count; ++i) {
      const int size = m.threads[first].loads[i].size;
      const int lanes = size <= 4 ? 32 : 128 / size;
      for (int phase = 0; phase < 32; phase += lanes) {
        std::vector<int> bank[32];
        size_t most = 1;
        for (int lane = phase; lane < phase + lanes; ++lane) {
          const Access a = m.threads[first + lane].loads[i];
          if (a.size != size) fail("lanes load different sizes");
          for (int w = a.place / 4; w < (a.place + a.size + 3) / 4; ++w) {
            std::vector<int>& b = bank[w % 32];
            bool known = false;
            for (int other : b) known = known || other == w;
            if (!known) b.push_back(w);
            most = b.size() > most ? b.size() : most;
          }
        }
        m.extra_wavefronts += static_cast<int64_t>(most) - 1;
      }
      ++m.loads;
    }
  }
}

// Runs one block of `threads` threads over `shared_bytes` of shared memory that holds rubbish.
inline void run_block(int threads, int shared_bytes, const std::function<void(int)>& body) {
  Machine& m = machine();
  m.threads.resize(threads);
  m.warps.assign(threads / 32, Warp());
  m.shared_store.assign(shared_bytes + 1024, 0xcd);
  m.shared = m.shared_store.data();
  while (reinterpret_cast<uintptr_t>(m.shared) % 1024) ++m.shared;
  m.shared_bytes = shared_bytes;
  m.words.assign(shared_bytes / 4, Word());
  m.epoch = m.arrived = 0;
  m.alive = threads;
  m.body = body;
  for (Thread& t : m.threads) {
    t.stack.resize(32 << 10);
    t.done = false;
    t.groups.clear();
    t.open.clear();
    t.loads.clear();
    // A fresh stack returns into fiber_main with the alignment a call leaves.
    uintptr_t top = reinterpret_cast<uintptr_t>(t.stack.data() + t.stack.size()) & ~uintptr_t(15);
    void** sp = reinterpret_cast<void**>(top) - 2;
    *sp = reinterpret_cast<void*>(&fiber_main);
    sp -= 6;
    for (int i = 0; i < 6; ++i) sp[i] = nullptr;
    t.stack_pointer = sp;
  }
  while (m.alive > 0) {
    m.moved = false;
    for (int i = 0; i < threads; ++i) {
      if (m.threads[i].done) continue;
      m.current = i;
      nb_switch_fiber(&m.scheduler, m.threads[i].stack_pointer);
    }
    if (!m.moved) fail("the threads wait for one another");
  }
  count_conflicts();
}

// --- memory --------------------------------------------------------------------------------------

inline void check_global(const void* p, int64_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  for (const Range& r : machine().ranges) {
    if (at >= r.begin && at + bytes <= r.end) return;
  }
  fail("a global address outside every buffer");
}

inline int place_of(const uint8_t* shared, int size, int align) {
  Machine& m = machine();
  const int64_t place = shared - m.shared;
  if (place < 0 || place + size > m.shared_bytes) fail("a place outside shared memory");
  if (place % align) fail("a misaligned place in shared memory");
  return static_cast<int>(place);
}

inline void note_read(int place, int size) {
  Machine& m = machine();
  if (m.hooks.read) {
    m.hooks.read(place, size);
    return;
  }
  for (int w = place / 4; w < (place + size) / 4; ++w) {
    Word& word = m.words[w];
    if (word.pending) fail("shared memory read while a copy into it is unfinished");
    if (!word.written) fail("shared memory read before it was written");
    if (word.writer != m.current && word.write_epoch == m.epoch) {
      fail("race: read in the interval in which another thread wrote");
    }
    word.reader = word.read_epoch == m.epoch && word.reader != m.current ? -2 : m.current;
    word.read_epoch = m.epoch;
  }
}

inline void check_write(int w) {
  Machine& m = machine();
  const Word& word = m.words[w];
  if (word.read_epoch == m.epoch && word.reader != m.current) {
    fail("race: written in the interval in which another thread read");
  }
  if (word.written && word.write_epoch == m.epoch && word.writer != m.current) {
    fail("race: two threads wrote in one interval");
  }
  if (word.pending) fail("race: written while a copy into it is unfinished");
}

inline void begin_copy(uint8_t* shared, const void* global, int size, int bytes) {
  Machine& m = machine();
  if (bytes < 0 || bytes > size) fail("a copy of more bytes than its size");
  if (reinterpret_cast<uintptr_t>(global) % size) fail("a misaligned source of a copy");
  Copy c = {place_of(shared, size, size), size, static_cast<const uint8_t*>(global), bytes, {}};
  if (bytes) check_global(global, bytes);
  memcpy(c.seen, global, bytes);
  for (int w = c.place / 4; w < (c.place + size) / 4; ++w) {
    check_write(w);
    ++m.words[w].pending;
  }
  self().open.push_back(c);
}

inline void finish_copy(const Copy& c) {
  Machine& m = machine();
  if (memcmp(c.seen, c.from, c.bytes) != 0) fail("the source of a copy changed under it");
  memset(m.shared + c.place, 0, c.size);
  memcpy(m.shared + c.place, c.from, c.bytes);
  for (int w = c.place / 4; w < (c.place + c.size) / 4; ++w) {
    Word& word = m.words[w];
    --word.pending;
    word.written = true;
    word.writer = m.current;
    word.write_epoch = m.epoch;
  }
}

}  // namespace emulation

inline void copy_async_16(uint8_t* shared, const void* global, int bytes) {
  emulation::begin_copy(shared, global, 16, bytes);
}
inline void copy_async_8(uint8_t* shared, const void* global, int bytes) {
  emulation::begin_copy(shared, global, 8, bytes);
}
inline uint64_t once_policy() { return 1; }
inline void copy_async_16_once(uint8_t* shared, const void* global, int bytes, uint64_t) {
  emulation::begin_copy(shared, global, 16, bytes);
}
inline void commit_copies() {
  emulation::Thread& t = emulation::self();
  t.groups.push_back(t.open);
  t.open.clear();
}
template <int kPending>
inline void wait_copies() {
  emulation::Thread& t = emulation::self();
  while (t.groups.size() > kPending) {
    for (const emulation::Copy& c : t.groups.front()) emulation::finish_copy(c);
    t.groups.erase(t.groups.begin());
  }
}

inline void sync_block() {
  emulation::Machine& m = emulation::machine();
  if (m.hooks.sync_block) {
    m.hooks.sync_block();
    return;
  }
  if (m.alive != static_cast<int>(m.threads.size())) emulation::fail("a barrier without a thread");
  const int epoch = m.epoch;
  if (++m.arrived == m.alive) {
    m.arrived = 0;
    ++m.epoch;
  }
  while (m.epoch == epoch) emulation::give_way();
  m.moved = true;
}

// A product waits for all 32 lanes here anyway, wherever they come from.
inline void sync_warp() {
  if (emulation::machine().hooks.sync_warp) emulation::machine().hooks.sync_warp();
}

template <class T>
inline float widen(uint16_t bits) {
  return T::kIsBF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}
template <class T>
inline uint16_t round_to(float v) {
  return T::kIsBF16 ? f32_to_bf16(v) : f32_to_f16(v);
}

template <class T>
inline void multiply_add_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Machine& m = emulation::machine();
  emulation::Thread& me = emulation::self();
  emulation::Warp& warp = m.warps[m.current / 32];
  me.c = c;
  me.a = a;
  me.b[0] = b0;
  me.b[1] = b1;
  const int generation = warp.generation;
  if (++warp.arrived == 32) {
    emulation::Thread* const lane = &m.threads[m.current / 32 * 32];
    const auto half = [](uint32_t w, int i) {
      return widen<T>(static_cast<uint16_t>(w >> 16 * i));
    };
    double left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l >> 2, t = l & 3;
      for (int i = 0; i < 2; ++i) {
        left[g][2 * t + i] = half(lane[l].a[0], i);
        left[g + 8][2 * t + i] = half(lane[l].a[1], i);
        left[g][2 * t + 8 + i] = half(lane[l].a[2], i);
        left[g + 8][2 * t + 8 + i] = half(lane[l].a[3], i);
        right[2 * t + i][g] = half(lane[l].b[0], i);
        right[2 * t + 8 + i][g] = half(lane[l].b[1], i);
      }
    }
    for (int l = 0; l < 32; ++l) {
      const int g = l >> 2, t = l & 3;
      for (int e = 0; e < 4; ++e) {
        const int row = g + 8 * (e >> 1), column = 2 * t + (e & 1);
        double sum = lane[l].c[e];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lane[l].c[e] = static_cast<float>(sum);
      }
    }
    warp.arrived = 0;
    ++warp.generation;
    ++m.products;
  }
  while (warp.generation == generation) emulation::give_way();
  m.moved = true;
}

template <class T>
inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto value = [i](uint32_t w) {
      return static_cast<double>(widen<T>(static_cast<uint16_t>(w >> i)));
    };
    const double exact = value(a) * value(b) + value(c);
    const uint16_t bits = round_to<T>(static_cast<float>(exact));
    if (widen<T>(bits) != exact) emulation::fail("a packed fma that rounds");
    out |= static_cast<uint32_t>(bits) << i;
  }
  return out;
}

inline float fma_float(float a, float b, float c) { return fmaf(a, b, c); }

template <class V>
inline V load_shared(const uint8_t* shared) {
  const int place = emulation::place_of(shared, sizeof(V), sizeof(V));
  emulation::note_read(place, sizeof(V));
  emulation::self().loads.push_back({place, static_cast<int>(sizeof(V))});
  V v;
  memcpy(&v, shared, sizeof(V));
  return v;
}
template <class V>
inline void store_shared(uint8_t* shared, const V& v) {
  emulation::Machine& m = emulation::machine();
  const int place = emulation::place_of(shared, sizeof(V), sizeof(V));
  if (m.hooks.write) {
    m.hooks.write(place, sizeof(V));
    memcpy(shared, &v, sizeof(V));
    return;
  }
  for (int w = place / 4; w < (place + static_cast<int>(sizeof(V))) / 4; ++w) {
    emulation::check_write(w);
    m.words[w].written = true;
    m.words[w].writer = m.current;
    m.words[w].write_epoch = m.epoch;
  }
  memcpy(shared, &v, sizeof(V));
}
template <class V>
inline V load_global(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::fail("a misaligned global load");
  emulation::check_global(p, sizeof(V));
  return *p;
}
template <class V>
inline void store_global(V* p, const V& v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::fail("a misaligned global store");
  emulation::check_global(p, sizeof(V));
  *p = v;
}
inline Floats4 load_others(const Floats4* p) { return load_global(p); }
inline void fence() {}
inline int count_arrival(int32_t* counter) {
  emulation::check_global(counter, 4);
  return (*counter)++;
}

}  // namespace cuda
}  // namespace nibblock
