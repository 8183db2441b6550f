#include "../int4_linear/vector_avx512.h"

#include "cpu_attention.h"

namespace nibblock {
namespace {

struct Attention512 : Avx512Base {
  static constexpr int kTileRows = 16;  // 16 x 1 sums: the rows that divide a chunk of 48 best
};

}  // namespace

Status causal_attention_avx512(const CausalAttentionParams& p) {
  return causal_attention_with<Attention512>(p);
}
Status causal_attention_grad_avx512(const CausalAttentionGradParams& p) {
  return causal_attention_grad_with<Attention512>(p);
}

}  // namespace nibblock
