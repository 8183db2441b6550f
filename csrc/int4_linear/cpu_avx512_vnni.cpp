// int4_linear for AVX-512 with VNNI: int16 activations (VPDPWSSD) and, opt-in, int8 (VPDPBUSD). The
// body is in cpu_integer.h; the input gradient has no use for VNNI and comes from cpu_avx512.cpp.
#include "vector_avx512.h"

#include "cpu_integer.h"

namespace nibblock {

Status int4_linear_avx512_vnni(const Int4LinearParams& p) {
  return forward_any_bits<Avx512Vnni, 16>(p);
}
Status int4_linear_avx512_vnni_int8(const Int4LinearParams& p) {
  return forward_any_bits<Avx512Vnni, 8>(p);
}

}  // namespace nibblock
