// The masked updates for AVX2. The bodies are in cpu_update.h,
// cpu_gradient.h and cpu_muon.h.
#include "update_avx2.h"

#include "cpu_gradient.h"
#include "cpu_muon.h"
#include "cpu_update.h"

namespace nibblock {

Status masked_update_avx2(const UpdateParams& p) { return update<Update2>(p); }
Status masked_grad_avx2(const GradParams& p) { return masked_grad<Update2>(p); }
Status prox_blocks_avx2(const ProxParams& p) { return prox_blocks<Update2>(p); }
Status muon_direction_avx2(const MuonParams& p) { return muon_direction<Update2>(p); }

}  // namespace nibblock
