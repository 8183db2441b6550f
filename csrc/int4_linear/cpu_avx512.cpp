// int4_linear for AVX-512 without VNNI. The bodies are in cpu_integer.h and cpu_dx.h.
#include "vector_avx512.h"

#include "cpu_dx.h"
#include "cpu_integer.h"

namespace nibblock {

Status int4_linear_avx512(const Int4LinearParams& p) { return forward_any_bits<Avx512, 16>(p); }
Status int4_linear_dx_avx512(const Int4LinearParams& p) {
  return input_gradient_any_bits<Avx512>(p);
}

}  // namespace nibblock
