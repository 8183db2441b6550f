#include "../int4_linear/vector_avx2.h"

#include "cpu_attention.h"
#include "cpu_bodies.h"

namespace nibblock {
namespace {

struct Attention2 : Avx2 {
  static constexpr int kTileRows = 6;  // 6 x 2 sums of 16 registers
};

}  // namespace

DecoderBodies decoder_bodies_avx2() { return bodies(); }

Status causal_attention_avx2(const CausalAttentionParams& p) {
  return causal_attention_with<Attention2>(p);
}
Status causal_attention_grad_avx2(const CausalAttentionGradParams& p) {
  return causal_attention_grad_with<Attention2>(p);
}

}  // namespace nibblock
