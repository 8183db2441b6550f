#include "cpu_attend.h"

namespace nibblock {

Status attend_avx2(const AttendParams& p) { return attend_any(p); }

}  // namespace nibblock
