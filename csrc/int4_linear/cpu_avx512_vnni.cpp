// int4_linear for AVX-512 with VNNI: int16 activations (VPDPWSSD) and, opt-in, int8 (VPDPBUSD). The
// bodies are in cpu_integer.h and cpu_dx_integer.h.
#include "vector_avx512.h"

#include "cpu_dx_integer.h"

namespace nibblock {

Status int4_linear_avx512_vnni(const Int4LinearParams& p) {
  return forward_any_bits<Avx512Vnni, 16>(p);
}
Status int4_linear_avx512_vnni_int8(const Int4LinearParams& p) {
  return forward_any_bits<Avx512Vnni, 8>(p);
}
Status int4_linear_dx_avx512_vnni_int16(const Int4LinearParams& p) {
  return integer_gradient_any_bits<Avx512Vnni, 16>(p);
}
Status int4_linear_dx_avx512_vnni_int8(const Int4LinearParams& p) {
  return integer_gradient_any_bits<Avx512Vnni, 8>(p);
}

}  // namespace nibblock
