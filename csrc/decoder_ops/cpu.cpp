// decoder_ops for the baseline instruction set, and the choice between it and AVX2.
#include "../common/cpu_features.h"
#include "cpu_attention.h"
#include "cpu_bodies.h"

namespace nibblock {
namespace {

struct Baseline8 {  // eight lanes, in whatever registers the baseline has
  using F = F8;
  static constexpr int kLanes = 8, kTileRows = 6;
  static F set1f(float v) { return F8{} + v; }
  static F loadf(const float* p) { return load8(p); }
  static void storef(float* p, F v) { store8(p, v); }
  static F fmaf(F a, F b, F c) { return a * b + c; }
};

const DecoderBodies& chosen() {
  static const DecoderBodies baseline = bodies(), avx2 = decoder_bodies_avx2();
  return cpu_isa() >= Isa::kAvx2 ? avx2 : baseline;
}

}  // namespace

void add_rms_norm(const AddRmsNormParams& p) { chosen().add_rms_norm(p); }
void rms_norm_grad(const RmsNormGradParams& p) { chosen().rms_norm_grad(p); }
void rotate(const RotateParams& p) { chosen().rotate(p); }
void silu_mul(const SiluMulParams& p) { chosen().silu_mul(p); }
void silu_mul_grad(const SiluMulGradParams& p) { chosen().silu_mul_grad(p); }
void softmax_grad(const SoftmaxGradParams& p) { chosen().softmax_grad(p); }
Status attend(const AttendParams& p) { return chosen().attend(p); }

Status causal_attention(const CausalAttentionParams& p) {
  if (cpu_isa() >= Isa::kAvx512) return causal_attention_avx512(p);
  if (cpu_isa() >= Isa::kAvx2) return causal_attention_avx2(p);
  return causal_attention_with<Baseline8>(p);
}
Status causal_attention_grad(const CausalAttentionGradParams& p) {
  if (cpu_isa() >= Isa::kAvx512) return causal_attention_grad_avx512(p);
  if (cpu_isa() >= Isa::kAvx2) return causal_attention_grad_avx2(p);
  return causal_attention_grad_with<Baseline8>(p);
}

}  // namespace nibblock
