// Runs the bursts of ceilings.h on several threads at once and binds them for Python.
#include "ceilings.h"

#include <emmintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "native.h"

namespace nibblock {
namespace ceilings {

uint64_t read_sse2(const uint8_t* base, size_t span, size_t lines) {
  __m128i sum = _mm_setzero_si128();
  for (size_t i = 0; i < lines; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      const __m128i* p = reinterpret_cast<const __m128i*>(base + s * span + i * 64);
      for (int j = 0; j < 4; ++j) sum = _mm_add_epi64(sum, _mm_loadu_si128(p + j));
    }
  }
  alignas(16) uint64_t out[2];
  _mm_store_si128(reinterpret_cast<__m128i*>(out), sum);
  return out[0] + out[1];
}

void copy_sse2(const uint8_t* from, uint8_t* to, size_t span, size_t lines) {
  for (size_t i = 0; i < lines; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      const size_t at = s * span + i * 64;
      const __m128i* p = reinterpret_cast<const __m128i*>(from + at);
      __m128i* q = reinterpret_cast<__m128i*>(to + at);
      for (int j = 0; j < 4; ++j) _mm_stream_si128(q + j, _mm_loadu_si128(p + j));
    }
  }
  _mm_sfence();
}

namespace {

namespace py = pybind11;
using Clock = std::chrono::steady_clock;

// Seconds from the first thread's start to the last one's end; body(thread) runs once on each.
// Starting the threads is not part of it: all of them wait at a gate.
template <class F>
double timed(int threads, const F& body) {
  std::atomic<int> waiting{threads};
  std::vector<Clock::time_point> begin(threads), end(threads);
  const auto work = [&](int t) {
    waiting.fetch_sub(1);
    while (waiting.load(std::memory_order_acquire) > 0) _mm_pause();
    begin[t] = Clock::now();
    body(t);
    end[t] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& o : others) o.join();
  const auto first = *std::min_element(begin.begin(), begin.end());
  const auto last = *std::max_element(end.begin(), end.end());
  return std::chrono::duration<double>(last - first).count();
}

// xorshift64*: the operands only have to be neither zero nor regular.
const Operands& operands() {
  static const std::unique_ptr<Operands> made = [] {
    std::unique_ptr<Operands> o(new Operands);
    uint64_t state = 0x9e3779b97f4a7c15ull;
    const auto next = [&state] {
      state ^= state >> 12;
      state ^= state << 25;
      state ^= state >> 27;
      return state * 0x2545f4914f6cdd1dull;
    };
    for (float& v : o->f32) v = static_cast<float>(static_cast<int64_t>(next())) * 1.0842022e-19f;
    for (size_t i = 0; i < kOperandBytes / 2; ++i) {
      const float v = static_cast<float>(static_cast<int64_t>(next())) * 1.0842022e-19f;
      uint32_t bits;
      memcpy(&bits, &v, 4);
      o->bf16[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (uint8_t& v : o->bytes) v = static_cast<uint8_t>(next() >> 56);
    return o;
  }();
  return *made;
}

struct Row {
  const char* name;
  const char* unit;
  const char* needs;
  bool (*available)(const CpuFeatures& f);
  double ops;
  void (*burst)(const Operands& o, int64_t iterations);
};

const Row kRows[] = {
    {"fma_avx2", "GFLOP/s", "AVX2 and FMA", [](const CpuFeatures& f) { return f.avx2 && f.fma; },
     kFmaAvx2Ops, burst_fma_avx2},
    {"fma_avx512", "GFLOP/s", "AVX-512F", [](const CpuFeatures& f) { return f.avx512f; },
     kFmaAvx512Ops, burst_fma_avx512},
    {"vnni_int8", "GOP/s", "AVX-512 VNNI", [](const CpuFeatures& f) { return f.avx512_vnni; },
     kVnniInt8Ops, burst_vnni_int8},
    {"vnni_int16", "GOP/s", "AVX-512 VNNI", [](const CpuFeatures& f) { return f.avx512_vnni; },
     kVnniInt16Ops, burst_vnni_int16},
    {"avx512_bf16", "GFLOP/s", "AVX512-BF16", [](const CpuFeatures& f) { return f.avx512_bf16; },
     kAvx512Bf16Ops, burst_avx512_bf16},
    {"amx_bf16", "GFLOP/s", "AMX-BF16",
     [](const CpuFeatures& f) { return f.amx_tile && f.amx_bf16; }, kAmxBf16Ops, burst_amx_bf16},
    {"amx_int8", "GOP/s", "AMX-INT8", [](const CpuFeatures& f) { return f.amx_tile && f.amx_int8; },
     kAmxInt8Ops, burst_amx_int8},
};

int want_seconds_and_threads(const char* op, int64_t threads, double seconds) {
  if (!(seconds > 0 && seconds <= 60)) {
    native::fail_value(op, "seconds must be in (0, 60], got " + std::to_string(seconds));
  }
  return native::want_threads(op, threads);
}

py::object measure(const std::string& name, int64_t asked_threads, double seconds) {
  const int threads = want_seconds_and_threads("measure_ceiling", asked_threads, seconds);
  for (const Row& row : kRows) {
    if (name != row.name) continue;
    if (!row.available(cpu_features())) return py::none();
    double rate;
    {
      py::gil_scoped_release release;
      const Operands& o = operands();
      row.burst(o, 1000);  // wakes the unit up
      int64_t n = 20000;
      const double trial = timed(1, [&](int) { row.burst(o, n); });
      n = std::max<int64_t>(1000, static_cast<int64_t>(n * seconds / std::max(trial, 1e-6)));
      const double wall = timed(threads, [&](int) { row.burst(o, n); });
      rate = row.ops * static_cast<double>(n) * threads / wall * 1e-9;
    }
    return py::float_(rate);
  }
  std::string known;
  for (const Row& row : kRows) known += std::string(known.empty() ? "" : ", ") + row.name;
  native::fail_value("measure_ceiling", "name must be one of " + known + ", got " + name);
}

py::list list_ceilings() {
  py::list out;
  for (const Row& row : kRows) {
    py::dict d;
    const bool available = row.available(cpu_features());
    d["name"] = row.name;
    d["unit"] = row.unit;
    d["available"] = available;
    d["reason"] =
        available ? "" : std::string("this CPU or its operating system has no ") + row.needs;
    out.append(d);
  }
  return out;
}

// A buffer larger than the caches, on huge pages where the system gives them. Each call goes on
// where the last one stopped, so short measurements find cold lines too.
class Bandwidth {
 public:
  explicit Bandwidth(int64_t bytes) {
    if (bytes < (1 << 22)) {
      native::fail_value("Bandwidth",
                         "bytes must be at least 4194304, got " + std::to_string(bytes));
    }
    bytes_ = static_cast<size_t>(bytes) / 4096 * 4096;
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(p);
    madvise(p, bytes_, MADV_HUGEPAGE);  // advice: where it is refused the figure shows it
    py::gil_scoped_release release;
    memset(data_, 1, bytes_);
  }
  ~Bandwidth() { munmap(data_, bytes_); }
  Bandwidth(const Bandwidth&) = delete;
  Bandwidth& operator=(const Bandwidth&) = delete;

  double read(int64_t threads, int64_t bytes) {
    const CpuFeatures& f = cpu_features();
    const auto body = f.avx512f ? read_avx512 : f.avx2 ? read_avx2 : read_sse2;
    return run("Bandwidth.read", threads, bytes, bytes_, [=](size_t at, size_t span, size_t lines) {
      const uint64_t sum = body(data_ + at, span, lines);
      __asm__ volatile("" ::"r"(sum));
    });
  }

  // Bytes read plus bytes written.
  double copy(int64_t threads, int64_t bytes) {
    const CpuFeatures& f = cpu_features();
    const auto body = f.avx512f ? copy_avx512 : f.avx2 ? copy_avx2 : copy_sse2;
    const size_t half = bytes_ / 8192 * 4096;
    const auto one = [=](size_t at, size_t span, size_t lines) {
      body(data_ + at, data_ + half + at, span, lines);
    };
    return 2 * run("Bandwidth.copy", threads, bytes / 2, half, one);
  }

  // Bytes read plus bytes written as an optimiser's step has them: of four streams, the gradient's
  // is read and the other three are changed in place.
  double update(int64_t threads, int64_t bytes) {
    static_assert(kStreams % 4 == 0, "streams come in fours");
    const auto one = [base = data_](size_t at, size_t span, size_t lines) {
      for (size_t i = 0; i < lines; ++i) {
        for (int s = 0; s < kStreams; s += 4) {
          uint8_t* line = base + at + s * span + i * 64;
          for (int b = 0; b < 64; b += 16) {
            const __m128i grad = _mm_load_si128(reinterpret_cast<__m128i*>(line + b));
            for (int w = 1; w < 4; ++w) {
              __m128i* to = reinterpret_cast<__m128i*>(line + w * span + b);
              _mm_store_si128(to, _mm_xor_si128(_mm_load_si128(to), grad));
            }
          }
        }
      }
    };
    return 1.75 * run("Bandwidth.update", threads, bytes * 4 / 7, bytes_, one);
  }

  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

 private:
  // Calls body(offset, span, lines) on each thread, for about `bytes` bytes in all out of the first
  // `region`; returns GB/s.
  template <class F>
  double run(const char* op, int64_t asked_threads, int64_t bytes, size_t region, const F& body) {
    const size_t threads = static_cast<size_t>(native::want_threads(op, asked_threads));
    // An odd number of lines apart: streams then never fall into the same cache set.
    const size_t span = ((region / (threads * kStreams) / 64 - 1) | 1) * 64;
    const size_t per_stream = span / 64;
    size_t lines = per_stream;
    if (bytes > 0) lines = std::min(lines, static_cast<size_t>(bytes) / (threads * kStreams * 64));
    lines = std::max<size_t>(lines, 1);
    if (cursor_ + lines > per_stream) cursor_ = 0;
    const size_t at = cursor_ * 64;
    cursor_ += lines;
    py::gil_scoped_release release;
    const double wall = timed(static_cast<int>(threads), [&](int t) {
      body(at + static_cast<size_t>(t) * kStreams * span, span, lines);
    });
    return static_cast<double>(threads * kStreams * lines * 64) / wall * 1e-9;
  }

  uint8_t* data_;
  size_t bytes_;
  size_t cursor_ = 0;
};

}  // namespace
}  // namespace ceilings

namespace native {

void bind_ceilings(py::module_& m) {
  using ceilings::Bandwidth;
  m.def("list_ceilings", &ceilings::list_ceilings,
        "The arithmetic units measure_ceiling knows: list of dict(name, unit, available, reason).");
  m.def("measure_ceiling", &ceilings::measure, py::arg("name"), py::arg("threads") = 1,
        py::arg("seconds") = 0.05,
        "Rate of one arithmetic unit in 1e9 operations a second over `threads` threads (a "
        "multiply-add "
        "counts two), measured for about `seconds`; None where this CPU has no such unit.");
  py::class_<Bandwidth>(
      m, "Bandwidth",
      "A buffer of `bytes` bytes (huge pages) to measure memory with, 8 streams a thread.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_property_readonly("bytes", &Bandwidth::bytes)
      .def("read", &Bandwidth::read, py::arg("threads") = 1, py::arg("bytes") = 0,
           "GB/s read; about `bytes` bytes are touched, going on where the last call stopped (0: "
           "all).")
      .def("copy", &Bandwidth::copy, py::arg("threads") = 1, py::arg("bytes") = 0,
           "GB/s read plus written while copying one half of the buffer to the other.")
      .def("update", &Bandwidth::update, py::arg("threads") = 1, py::arg("bytes") = 0,
           "GB/s read plus written where of four streams one is read and three change in place.");
}

}  // namespace native
}  // namespace nibblock
