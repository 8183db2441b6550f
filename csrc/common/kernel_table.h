// How a call finds its row in an op's table of {id, isa, what it serves, run}: the first whose
// level is allowed on this CPU and that serves it, or the one named. Included by baseline files
// alone.
#pragma once

#include "cpu_features.h"
#include "status.h"

namespace nibblock {
namespace {

static inline bool same_id(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

template <class Table, class Params>
auto select_row(const Table& t, const Params& p) -> decltype(t.rows) {
  const Isa isa = cpu_isa();
  for (int i = 0; i < t.count; ++i) {
    if (t.rows[i].isa <= isa && t.rows[i].serves(p)) return &t.rows[i];
  }
  return nullptr;
}

// An empty call is checked like any other and runs nothing.
template <class Table, class Params>
Status run_row(const Table& t, const Params& p, const char* forced_id, bool empty) {
  decltype(t.rows) row = nullptr;
  if (forced_id) {
    for (int i = 0; i < t.count && !row; ++i) {
      if (same_id(t.rows[i].id, forced_id)) row = &t.rows[i];
    }
    if (!row) return kUnknownKernel;
    if (row->isa > cpu_isa()) return kIsaUnavailable;
    if (!row->serves(p)) return kNotServed;
  } else {
    row = select_row(t, p);
    if (!row) return kNoKernel;
  }
  return empty ? kOk : row->run(p);
}

}  // namespace
}  // namespace nibblock
