// decoder_ops for the baseline instruction set, and the choice between it and AVX2.
#include "../common/cpu_features.h"
#include "cpu_bodies.h"

namespace nibblock {
namespace {

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

}  // namespace nibblock
