// The masked updates for AVX-512. The bodies are in cpu_update.h,
// cpu_gradient.h and cpu_muon.h.
#include "update_avx512.h"

#include "cpu_gradient.h"
#include "cpu_muon.h"
#include "cpu_update.h"

namespace nibblock {

Status masked_update_avx512(const UpdateParams& p) { return update<Update512>(p); }
Status masked_grad_avx512(const GradParams& p) { return masked_grad<Update512>(p); }
Status prox_blocks_avx512(const ProxParams& p) { return prox_blocks<Update512>(p); }
Status muon_direction_avx512(const MuonParams& p) { return muon_direction<Update512>(p); }

}  // namespace nibblock
