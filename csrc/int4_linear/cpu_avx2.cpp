// int4_linear for AVX2 + FMA + F16C. The bodies are in cpu_integer.h, cpu_dx.h and
// cpu_dx_integer.h.
#include "vector_avx2.h"

#include "cpu_dx_integer.h"

namespace nibblock {

Status int4_linear_avx2(const Int4LinearParams& p) { return forward_any_bits<Avx2, 16>(p); }
Status int4_linear_avx2_int8(const Int4LinearParams& p) { return forward<Avx2Bytes, 4, 8>(p); }
Status int4_linear_dx_avx2_int16(const Int4LinearParams& p) {
  return integer_gradient_any_bits<Avx2, 16>(p);
}
Status int4_linear_dx_avx2_int8(const Int4LinearParams& p) {
  return integer_gradient<Avx2Turned, 4, 8>(p);
}
Status int4_linear_dx_avx2(const Int4LinearParams& p) { return input_gradient_any_bits<Avx2>(p); }

}  // namespace nibblock
