// What every torch_cuda.cpp shares: the device check, torch's current stream, and counters that are
// zero between launches. LibTorch stable ABI; no CUDA headers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "../common/status.h"
#include "check.h"
#include "text.h"

namespace nibblock {
namespace glue {

inline void check_cuda(const char* op, const char* arg, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", arg, " must be on a CUDA device, got another device");
}

// t lies where x does.
inline void check_beside_x(const char* op, const char* arg, const Tensor& t, int32_t device) {
  check_cuda(op, arg, t);
  STD_TORCH_CHECK(t.get_device_index() == device, op, ": ", arg, " must be on cuda:", device,
                  ", where x is, got cuda:", t.get_device_index());
}

// What any table of CUDA kernels may answer; which calls a row serves, its own glue says before.
inline void check_cuda_status(const char* op, Status s, const std::string& kernel, int error,
                              const char* error_text) {
  STD_TORCH_CHECK(s != kUnknownKernel, op, ": kernel must be the id of a CUDA row, got \"", kernel,
                  "\"");
  STD_TORCH_CHECK(s != kDeviceTooOld, op,
                  ": no kernel for this GPU: compute capability must be 8.0 or higher");
  STD_TORCH_CHECK(s != kDeviceError, op, ": CUDA error ", error, " (", error_text, ")");
}

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Arrival counters: int32 zeros that every launch leaves as zeros, so they are written once and not
// by a launch of their own each time. Launches that may overlap must not share them, hence one
// tensor for each stream. A capture into a CUDA graph gets its own: the graph then holds the one
// node that zeroes them, and may be replayed on any stream. More than kCounters are made for the
// call alone.
inline Tensor zero_counters(const Tensor& like, int64_t count, int32_t device, void* stream,
                            unsigned long long capture) {
  constexpr int64_t kCounters = 16384;
  const auto zeros = [&](int64_t size) {
    return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(&size, 1),
                                    ScalarType::Int);
  };
  if (count > kCounters) return zeros(count);
  struct Entry {
    unsigned long long capture;
    Tensor counters;
  };
  // Never destroyed: at exit the device may be gone before static objects are.
  static std::mutex& lock = *new std::mutex;
  static auto& known = *new std::map<std::tuple<int32_t, void*, bool>, Entry>;
  const std::lock_guard<std::mutex> guard(lock);
  const auto key = std::make_tuple(device, stream, capture != 0);
  const auto found = known.find(key);
  if (found != known.end() && found->second.capture == capture) return found->second.counters;
  // A finished capture's graph owns its memory: only our hold on it ends.
  if (found != known.end()) known.erase(found);
  return known.emplace(key, Entry{capture, zeros(kCounters)}).first->second.counters;
}

}  // namespace glue
}  // namespace nibblock
