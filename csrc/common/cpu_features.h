// What this CPU and its operating system allow, and the level nibblock runs at.
//
// Compiled with baseline flags only. Asks CPUID and XGETBV itself: compilers disagree on the
// feature names that __builtin_cpu_supports knows, and none of them knows about AMX's permission
// from the kernel.
#pragma once

#include "status.h"

namespace nibblock {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAmx = 4 };
constexpr int kIsaCount = 5;

struct CpuFeatures {
  bool avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16, avx512_fp16;
  bool amx_tile, amx_int8, amx_bf16;  // true only when the kernel also granted the tile state
};

NB_API const CpuFeatures& cpu_features();

// Highest level the CPU and the operating system allow.
NB_API Isa cpu_isa_max();

// The level in force: cpu_isa_max(), lowered by NIBBLOCK_ISA (read once) or by set_cpu_isa.
NB_API Isa cpu_isa();

// Why NIBBLOCK_ISA cannot be honoured (unknown name, or above this CPU); null when it can.
NB_API const char* cpu_isa_error();

// Lowers (or restores) the level for this process; false if the level is above cpu_isa_max().
NB_API bool set_cpu_isa(Isa level);

NB_API const char* isa_name(Isa level);  // "scalar" | "avx2" | "avx512" | "avx512_vnni" | "amx"
NB_API bool isa_from_name(const char* name, Isa* level);

}  // namespace nibblock
