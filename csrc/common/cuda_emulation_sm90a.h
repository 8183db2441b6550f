// The part of the software model (cuda_emulation.h) that stands for cuda_sm90a.cuh: barriers in
// shared memory, bulk and tensor copies, products of a warpgroup.
//
// Written from the PTX manual: it decodes descriptors and tensor maps, and knows no kernel's
// layout. Beyond what the rest of the model checks, it aborts on:
//   - threads that wait for one another (the scheduler finds that nobody moves)
//   - more arrivals or bytes on a barrier than its phase has
//   - shared memory read without having waited for the barrier its copy completes on, or
//     overwritten by a copy that did not wait for its readers. Each thread has a clock of what it
//     knows of the others (a vector clock), so this does not depend on the order the model runs in
//   - fragments or sums touched while a product that uses them is unfinished; products without
//     their fence; a warpgroup whose threads ask for different products
//
// Copies land when somebody waits for the last of a barrier's bytes. A product reads shared memory,
// its fragments and its sums at the wait that finishes it; until then the sums are NaN.
#pragma once

#include <map>

#include "cuda_emulation.h"

namespace nibblock {
namespace cuda {

// How the driver's tensor map is filled in is the test's business: these are its fields.
struct EmulatedMap {
  const void* address;
  uint64_t size[2], row_bytes;
  uint32_t box[2];
  int element, swizzle;
};
static_assert(sizeof(EmulatedMap) <= sizeof(TensorMap), "fits");

namespace emulation {

using Clock = std::vector<int>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = from[i] > into[i] ? from[i] : into[i];
}

struct Landing {
  int place;
  std::vector<uint8_t> data;
};

struct Barrier {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t expected = 0, queued = 0;
  std::vector<Landing> copies;
  Clock arriving, passed;
  bool fenced = false;
};

struct Meeting {  // of the threads that sync together
  int arrived = 0, generation = 0;
  Clock arriving, passed;
};

struct Cell {                                // one word of shared memory
  int barrier = -1, phase = 0;               // its bytes came with this phase of this barrier, or
  int writer = -1, when = 0;                 // were stored by this thread
  std::vector<std::pair<int, int>> readers;  // thread, when
};

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t a_then[4];
  uint64_t b;
  int n, keep;
  bool is_bf16;
};

struct Sums {  // of products that are unfinished
  float* d;
  int products;
  std::vector<float> value;
};

struct Actor {  // what a thread has beyond emulation::Thread
  Clock clock;
  std::map<int, int> seen;  // phases of barriers waited for
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<Sums> sums;
  bool fenced = false;
};

struct Model {
  std::vector<Actor> actors;
  std::vector<Meeting> warps, groups, numbered;
  std::map<int, Barrier> barriers;
  std::vector<Cell> cells;
};
inline Model& model() {
  static Model m;
  return m;
}
inline Actor& actor() { return model().actors[machine().current]; }

// What the thread has done so far becomes known through `to`.
inline void release(Clock& to) {
  Actor& me = actor();
  join(to, me.clock);
  ++me.clock[machine().current];
}

template <class Last>
inline void meet(Meeting& at, int count, bool orders, const Last& last) {
  if (orders) release(at.arriving);
  const int generation = at.generation;
  if (++at.arrived == count) {
    last();
    at.passed.swap(at.arriving);
    at.arriving.clear();
    at.arrived = 0;
    ++at.generation;
  }
  while (at.generation == generation) give_way();
  machine().moved = true;
  if (orders) join(actor().clock, at.passed);
}

// --- shared memory -------------------------------------------------------------------------------

constexpr int kSharedBase = 3 << 10;  // the address of the model's shared memory

inline void check_cell_read(int w, int reader) {
  const Cell& cell = model().cells[w];
  const Actor& a = model().actors[reader];
  if (machine().words[w].pending) fail("shared memory read while a copy into it is unfinished");
  if (!machine().words[w].written) fail("shared memory read before it was written");
  if (cell.barrier >= 0) {
    const auto found = a.seen.find(cell.barrier);
    if (found == a.seen.end() || found->second < cell.phase) {
      fail("shared memory read without waiting for its barrier");
    }
  } else if (cell.writer != reader && a.clock[cell.writer] < cell.when) {
    fail("race: read without a barrier behind the write");
  }
}
inline void read_cell(int w, int reader) {
  check_cell_read(w, reader);
  Cell& cell = model().cells[w];
  const int when = model().actors[reader].clock[reader];
  for (auto& r : cell.readers) {
    if (r.first == reader) {
      r.second = when;
      return;
    }
  }
  cell.readers.push_back({reader, when});
}
// A store or a copy by this thread overwrites the word.
inline void overwrite_cell(int w) {
  Cell& cell = model().cells[w];
  const Clock& known = actor().clock;
  const int me = machine().current;
  if (machine().words[w].pending) fail("race: written while a copy into it is unfinished");
  for (const auto& r : cell.readers) {
    if (r.first != me && known[r.first] < r.second) {
      fail("race: written without a barrier behind a read");
    }
  }
  if (cell.writer >= 0 && cell.writer != me && known[cell.writer] < cell.when) {
    fail("race: two threads wrote without a barrier between");
  }
  cell = Cell();
}

inline void on_read(int place, int size) {
  for (int w = place / 4; w < (place + size) / 4; ++w) read_cell(w, machine().current);
}
inline void on_write(int place, int size) {
  for (int w = place / 4; w < (place + size) / 4; ++w) {
    overwrite_cell(w);
    model().cells[w].writer = machine().current;
    model().cells[w].when = actor().clock[machine().current];
    machine().words[w].written = true;
  }
}
inline void on_sync_warp() {
  meet(model().warps[machine().current / 32], 32, true, [] {});
}
inline void on_sync_block() {
  meet(model().numbered[0], static_cast<int>(machine().threads.size()), true, [] {});
}

// --- barriers ------------------------------------------------------------------------------------

inline int barrier_place(const uint8_t* barrier) { return place_of(barrier, 8, 8); }
inline Barrier& find_barrier(const uint8_t* barrier) {
  const auto found = model().barriers.find(barrier_place(barrier));
  if (found == model().barriers.end()) fail("a barrier that was not made");
  return found->second;
}
inline void end_phase(int place, Barrier& b) {
  if (b.queued > b.expected) fail("more bytes came than the barrier expects");
  if (b.pending || b.queued < b.expected) return;
  ++b.phase;
  for (const Landing& l : b.copies) {
    memcpy(machine().shared + l.place, l.data.data(), l.data.size());
    for (int w = l.place / 4; w < (l.place + static_cast<int>(l.data.size())) / 4; ++w) {
      --machine().words[w].pending;
      machine().words[w].written = true;
      model().cells[w].barrier = place;
      model().cells[w].phase = b.phase;
    }
  }
  b.copies.clear();
  b.expected = b.queued = 0;
  b.pending = b.arrivals;
  b.passed.swap(b.arriving);
  b.arriving.clear();
}

inline void land_on(uint8_t* barrier, uint8_t* shared, std::vector<uint8_t> data) {
  Barrier& b = find_barrier(barrier);
  if (!b.fenced) fail("a copy onto a barrier that was not fenced");
  const int place = place_of(shared, static_cast<int>(data.size()), 16);
  for (int w = place / 4; w < (place + static_cast<int>(data.size())) / 4; ++w) {
    overwrite_cell(w);
    ++machine().words[w].pending;
  }
  b.queued += static_cast<int64_t>(data.size());
  b.copies.push_back({place, std::move(data)});
}

// --- products ------------------------------------------------------------------------------------

// Place in shared memory of element (column, k) of a 16-bit operand [columns][16 k], k contiguous,
// by its matrix descriptor. Core matrices are 8 columns of 16 bytes.
inline int operand_place(uint64_t descriptor, int column, int k) {
  const int start = static_cast<int>(descriptor & 0x3fff) << 4;
  const int along_k = static_cast<int>(descriptor >> 16 & 0x3fff) << 4;
  const int along_columns = static_cast<int>(descriptor >> 32 & 0x3fff) << 4;
  const int base_offset = static_cast<int>(descriptor >> 49 & 7);
  const int swizzle = static_cast<int>(descriptor >> 62);
  if (base_offset) fail("a matrix descriptor whose pattern does not begin at 1024 bytes");
  int address;
  if (swizzle == 1) {  // 128 bytes: the eight units of a row, exchanged by the row
    address = start + column / 8 * along_columns + column % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
  } else if (swizzle == 0) {
    address = start + column / 8 * along_columns + k / 8 * along_k + column % 8 * 16 + k % 8 * 2;
  } else {
    fail("a matrix descriptor with a swizzle the model does not know");
  }
  if (address < kSharedBase || address + 2 > kSharedBase + machine().shared_bytes) {
    fail("a matrix descriptor that leads outside shared memory");
  }
  return address - kSharedBase;
}

inline uint32_t poison(int i) { return 0x7fa00000u | static_cast<uint32_t>(i); }

inline void check_operand(const Product& p) {
  for (int column = 0; column < p.n; ++column) {
    for (int k = 0; k < 16; k += 2) {
      check_cell_read(operand_place(p.b, column, k) / 4, machine().current);
    }
  }
}

inline float element(bool is_bf16, uint16_t bits) {
  return is_bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// Product number `index` of the oldest groups of the 128 threads from `first` on.
inline void multiply(int first, size_t index) {
  Model& m = model();
  const Product& of = m.actors[first].groups.front()[index];
  std::vector<double> b(16 * of.n);
  for (int column = 0; column < of.n; ++column) {
    for (int k = 0; k < 16; ++k) {
      const int place = operand_place(of.b, column, k);
      for (int warp = 0; k % 2 == 0 && warp < 4; ++warp) read_cell(place / 4, first + 32 * warp);
      uint16_t bits;
      memcpy(&bits, machine().shared + place, 2);
      b[16 * column + k] = element(of.is_bf16, bits);
    }
  }
  double a[64][16];
  for (int t = 0; t < 128; ++t) {
    const Product& p = m.actors[first + t].groups.front()[index];
    if (p.b != of.b || p.n != of.n || p.keep != of.keep || p.is_bf16 != of.is_bf16) {
      fail("threads of a warpgroup ask for different products");
    }
    if (memcmp(p.a, p.a_then, 16)) fail("fragments changed under a product");
    const int g = t % 32 / 4, quad = t % 4, row = t / 32 * 16;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) {  // rows g, g + 8, g, g + 8; columns from 0, 0, 8, 8
        const uint16_t bits = static_cast<uint16_t>(p.a_then[r] >> 16 * i);
        a[row + g + 8 * (r & 1)][8 * (r >> 1) + 2 * quad + i] = element(of.is_bf16, bits);
      }
    }
  }
  for (int t = 0; t < 128; ++t) {
    Actor& who = m.actors[first + t];
    const Product& p = who.groups.front()[index];
    for (size_t s = 0; s < who.sums.size(); ++s) {
      Sums& sums = who.sums[s];
      if (sums.d != p.d) continue;
      for (int i = 0; i < of.n / 2; ++i) {
        uint32_t bits;
        memcpy(&bits, sums.d + i, 4);
        if (bits != poison(i)) fail("sums touched under a product");
        const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i >> 1 & 1);
        const int column = i / 4 * 8 + t % 4 * 2 + (i & 1);
        double sum = of.keep ? sums.value[i] : 0.0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[16 * column + k];
        sums.value[i] = static_cast<float>(sum);
      }
      if (--sums.products == 0) {
        memcpy(sums.d, sums.value.data(), 4 * sums.value.size());
        who.sums.erase(who.sums.begin() + static_cast<int64_t>(s));
      }
      break;
    }
  }
  ++machine().products;
}

template <class T>
inline void ask_product(float* d, int n, const uint32_t* a, uint64_t b, int keep) {
  Actor& me = actor();
  if (!me.fenced) fail("a product without its fence");
  Product p = {d, a, {a[0], a[1], a[2], a[3]}, b, n, keep, T::kIsBF16};
  // Its operand must be there by now, not only when the product ends. One lane speaks for its warp.
  if (machine().current % 32 == 0) check_operand(p);
  for (Sums& s : me.sums) {
    if (s.d == d) {
      ++s.products;
      me.open.push_back(p);
      return;
    }
  }
  me.sums.push_back({d, 1, std::vector<float>(d, d + n / 2)});
  for (int i = 0; i < n / 2; ++i) {
    const uint32_t bits = poison(i);
    memcpy(d + i, &bits, 4);
  }
  me.open.push_back(p);
}

inline void wait_for_products(size_t pending) {
  Actor& me = actor();
  const int first = machine().current / 128 * 128;
  while (me.groups.size() > pending) {
    // Orders nothing: on the GPU a warp waits for its own products only.
    meet(model().groups[first / 128], 128, false, [&] {
      const size_t count = me.groups.front().size();
      for (int t = 0; t < 128; ++t) {
        const Actor& other = model().actors[first + t];
        if (other.groups.empty() || other.groups.front().size() != count) {
          fail("threads of a warpgroup wait for different products");
        }
      }
      for (size_t i = 0; i < count; ++i) multiply(first, i);
      for (int t = 0; t < 128; ++t) {
        auto& groups = model().actors[first + t].groups;
        groups.erase(groups.begin());
      }
    });
  }
}

// Runs one block. As run_block(), with the checks above.
inline void run_block_sm90a(int threads, int shared_bytes, const std::function<void(int)>& body) {
  Model& m = model();
  m.actors.assign(threads, Actor());
  for (int t = 0; t < threads; ++t) {
    m.actors[t].clock.assign(threads, 0);
    m.actors[t].clock[t] = 1;
  }
  m.warps.assign(threads / 32, Meeting());
  m.groups.assign(threads / 128, Meeting());
  m.numbered.assign(16, Meeting());
  m.barriers.clear();
  m.cells.assign(shared_bytes / 4, Cell());
  Machine& base = machine();
  base.hooks = {on_read, on_write, on_sync_warp, on_sync_block};
  run_block(threads, shared_bytes, body);
  base.hooks = {};
  for (const auto& b : m.barriers) {
    if (!b.second.copies.empty()) fail("copies that nobody waited for");
  }
  for (const Actor& a : m.actors) {
    if (!a.open.empty() || !a.groups.empty()) fail("products that nobody waited for");
  }
}

}  // namespace emulation

inline int same_in_warp(int v) { return v; }
inline uint32_t shared_address(const uint8_t* p) {
  return static_cast<uint32_t>(p - emulation::machine().shared) + emulation::kSharedBase;
}

inline void barrier_init(uint8_t* barrier, int arrivals) {
  emulation::Barrier b;
  b.arrivals = b.pending = arrivals;
  emulation::model().barriers[emulation::barrier_place(barrier)] = b;
}
inline void barrier_init_fence() {
  for (auto& b : emulation::model().barriers) b.second.fenced = true;
}
inline void arrive_at(uint8_t* barrier, int bytes) {
  emulation::Barrier& b = emulation::find_barrier(barrier);
  if (b.pending == 0) emulation::fail("more arrivals than the barrier counts");
  emulation::release(b.arriving);
  --b.pending;
  b.expected += bytes;
  // One that expects bytes ends when somebody waits: as late as it may.
  if (b.expected == 0) emulation::end_phase(emulation::barrier_place(barrier), b);
}
inline void barrier_arrive(uint8_t* barrier) { arrive_at(barrier, 0); }
inline void barrier_arrive_expect(uint8_t* barrier, int bytes) { arrive_at(barrier, bytes); }
inline void barrier_wait(uint8_t* barrier, uint32_t parity) {
  const int place = emulation::barrier_place(barrier);
  emulation::Barrier& b = emulation::find_barrier(barrier);
  while (static_cast<uint32_t>(b.phase & 1) == parity) {
    emulation::end_phase(place, b);
    if (static_cast<uint32_t>(b.phase & 1) == parity) emulation::give_way();
  }
  emulation::machine().moved = true;
  emulation::join(emulation::actor().clock, b.passed);
  emulation::actor().seen[place] = b.phase;
}
inline void sync_threads(int number, int threads) {
  emulation::meet(emulation::model().numbered[number], threads, true, [] {});
}

inline uint64_t shared_policy() { return 2; }
inline void copy_bulk(uint8_t* shared, const void* global, int bytes, uint8_t* barrier, uint64_t) {
  if (bytes <= 0 || bytes % 16) emulation::fail("a bulk copy that is no multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16) emulation::fail("a misaligned source of a copy");
  emulation::check_global(global, bytes);
  const uint8_t* const from = static_cast<const uint8_t*>(global);
  emulation::land_on(barrier, shared, std::vector<uint8_t>(from, from + bytes));
}
inline void copy_box(uint8_t* shared, const TensorMap* map, int column, int row, uint8_t* barrier) {
  EmulatedMap e;
  memcpy(&e, map->bytes, sizeof(e));
  const int width = static_cast<int>(e.box[0]) * 2;
  if (e.element != 9 && e.element != 6) emulation::fail("a tensor map of another type");
  if (reinterpret_cast<uintptr_t>(e.address) % 16 || e.row_bytes % 16 || e.box[0] == 0 ||
      e.box[0] > 256 || e.box[1] == 0 || e.box[1] > 256 || e.size[0] == 0 || e.size[1] == 0) {
    emulation::fail("a tensor map the driver would refuse");
  }
  if (e.swizzle != 3 || width != 128) emulation::fail("a swizzle the model does not know");
  if (shared_address(shared) % 1024) emulation::fail("a swizzled box at no multiple of 1024");
  std::vector<uint8_t> data(static_cast<size_t>(width) * e.box[1]);
  for (uint32_t r = 0; r < e.box[1]; ++r) {
    for (uint32_t c = 0; c < e.box[0]; ++c) {
      const int64_t at_row = row + static_cast<int64_t>(r), at = column + static_cast<int64_t>(c);
      uint16_t v = 0;
      if (at_row >= 0 && at_row < static_cast<int64_t>(e.size[1]) && at >= 0 &&
          at < static_cast<int64_t>(e.size[0])) {
        const uint8_t* const from = static_cast<const uint8_t*>(e.address) +
                                    at_row * static_cast<int64_t>(e.row_bytes) + 2 * at;
        emulation::check_global(from, 2);
        memcpy(&v, from, 2);
      }
      // Unit u of 16 bytes of row r stands where u ^ r % 8 would.
      const uint32_t unit = c / 8 ^ r % 8;
      memcpy(data.data() + r * 128 + unit * 16 + c % 8 * 2, &v, 2);
    }
  }
  emulation::land_on(barrier, shared, std::move(data));
}

template <class T, int kCount>
inline void begin_product(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, int keep) {
  emulation::ask_product<T>(d, 2 * kCount, a, b, keep);
}
inline void product_fence() { emulation::actor().fenced = true; }
inline void commit_products() {
  emulation::Actor& me = emulation::actor();
  me.groups.push_back(me.open);
  me.open.clear();
  me.fenced = false;
}
template <int kPending>
inline void wait_products() {
  emulation::wait_for_products(kPending);
}
template <int kCount>
inline void finish_products(float (&)[kCount]) {
  wait_products<0>();
}
template <int>
inline void fewer_registers() {}
template <int>
inline void more_registers() {}

}  // namespace cuda
}  // namespace nibblock
