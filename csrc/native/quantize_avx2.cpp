// The same quantiser compiled for AVX2 (flags: setup.py), bit for bit the same results; see
// quantize.h.
#include "quantize_body.h"

namespace nibblock {
namespace native {

int64_t quantize_rows_avx2(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  return quantize_rows(p, begin, end, scratch);
}

}  // namespace native
}  // namespace nibblock
