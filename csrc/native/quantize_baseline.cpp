// The quantiser for any x86-64-v2 machine; see quantize.h.
#include "quantize_body.h"

namespace nibblock {
namespace native {

int64_t quantize_rows_baseline(const QuantizeParams& p, int64_t begin, int64_t end,
                               float* scratch) {
  return quantize_rows(p, begin, end, scratch);
}

}  // namespace native
}  // namespace nibblock
