#include "cpu_attend.h"

#include "../common/cpu_features.h"

namespace nibblock {

Status attend_baseline(const AttendParams& p) { return attend_any(p); }

Status attend(const AttendParams& p) {
  return cpu_isa() >= Isa::kAvx2 ? attend_avx2(p) : attend_baseline(p);
}

}  // namespace nibblock
