#include "cpu_features.h"

#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace nibblock {
namespace {

constexpr int kArchReqXcompPerm = 0x1023;  // asm/prctl.h of Linux 5.16 and newer
constexpr int kXfeatureTileData = 18;

uint64_t read_xcr0() {
  uint32_t lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// The kernel saves the 8 KiB of tile state only for processes that asked. Any refusal (old kernel,
// seccomp, gVisor, a sigaltstack that is too small) means there is no AMX here.
bool amx_permission() { return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0; }

CpuFeatures detect() {
  CpuFeatures f;
  memset(&f, 0, sizeof f);
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28);
  if (!osxsave || !avx) return f;
  const uint64_t xcr0 = read_xcr0();
  const bool os_ymm = (xcr0 & 0x6) == 0x6;
  const bool os_zmm = os_ymm && (xcr0 & 0xe0) == 0xe0;
  const bool os_tile = (xcr0 & 0x60000) == 0x60000;
  f.fma = os_ymm && (c & (1u << 12));
  f.f16c = os_ymm && (c & (1u << 29));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = os_ymm && (b & (1u << 5));
  f.avx512f = os_zmm && (b & (1u << 16));
  f.avx512dq = os_zmm && (b & (1u << 17));
  f.avx512bw = os_zmm && (b & (1u << 30));
  f.avx512vl = os_zmm && (b & (1u << 31));
  f.avx512_vnni = os_zmm && (c & (1u << 11));
  f.avx512_fp16 = os_zmm && (d & (1u << 23));
  const bool tile = os_tile && (d & (1u << 24));
  const bool tile_bf16 = d & (1u << 22), tile_int8 = d & (1u << 25);
  const uint32_t subleaves = a;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    f.avx512_bf16 = os_zmm && (a & (1u << 5));
  if (tile && tile_bf16 && tile_int8 && amx_permission())
    f.amx_tile = f.amx_bf16 = f.amx_int8 = true;
#ifdef NIBBLOCK_EMULATE_AVX512
  f.avx512f = f.avx512dq = f.avx512bw = f.avx512vl = f.avx512_vnni = f.avx512_bf16 = true;
  f.amx_tile = f.amx_bf16 = f.amx_int8 = true;
#endif
  return f;
}

Isa highest(const CpuFeatures& f) {
  if (!(f.avx2 && f.fma && f.f16c)) return Isa::kScalar;
  if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl)) return Isa::kAvx2;
  if (!f.avx512_vnni) return Isa::kAvx512;
  if (!(f.amx_tile && f.avx512_bf16)) return Isa::kAvx512Vnni;
  return Isa::kAmx;
}

const char* const kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_vnni", "amx"};

struct Level {
  std::atomic<int> isa;
  char error[192];
  Level() {
    error[0] = 0;
    const Isa max = cpu_isa_max();
    isa = static_cast<int>(max);
    const char* env = getenv("NIBBLOCK_ISA");
    if (!env || !*env) return;
    Isa asked;
    if (!isa_from_name(env, &asked)) {
      snprintf(
          error, sizeof error,
          "nibblock: NIBBLOCK_ISA must be one of scalar, avx2, avx512, avx512_vnni, amx, got %.40s",
          env);
    } else if (asked > max) {
      snprintf(error, sizeof error,
               "nibblock: NIBBLOCK_ISA must be at most %s on this CPU, got %s; it can only lower "
               "the level",
               isa_name(max), isa_name(asked));
    } else {
      isa = static_cast<int>(asked);
    }
  }
};

Level& level() {
  static Level l;
  return l;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures f = detect();
  return f;
}

Isa cpu_isa_max() { return highest(cpu_features()); }

Isa cpu_isa() { return static_cast<Isa>(level().isa.load(std::memory_order_relaxed)); }

const char* cpu_isa_error() { return level().error[0] ? level().error : nullptr; }

bool set_cpu_isa(Isa isa) {
  if (isa > cpu_isa_max()) return false;
  level().isa.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

}  // namespace nibblock
