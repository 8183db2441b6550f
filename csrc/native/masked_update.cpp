// The tables of the masked updates. Their kernels change the caller's memory in place and take
// lists of tensors, so there is no NumPy way to run them: the tests reach each row through torch,
// at each level in force.
#include "../masked_update/masked_update.h"
#include "../masked_update/muon_direction.h"
#include "native.h"

namespace nibblock {
namespace native {
namespace {

using std::string;

template <class Table>
py::list rows_of(const Table& t) {
  py::list out;
  for (int i = 0; i < t.count; ++i) {
    const bool available = t.rows[i].isa <= cpu_isa();
    py::dict d;
    d["id"] = t.rows[i].id;
    d["isa"] = isa_name(t.rows[i].isa);
    d["serves"] = t.rows[i].serves_text;
    d["available"] = available;
    d["reason"] = available ? string()
                            : string("needs ") + isa_name(t.rows[i].isa) +
                                  ", the level in force is " + isa_name(cpu_isa());
    out.append(d);
  }
  return out;
}

py::list kernels(const string& which) {
  const char* const rules[] = {"adamw_", "sgd_"};
  const char* const kinds[] = {"block", "flat", "bool"};
  for (int rule = 0; rule < 2; ++rule) {
    for (int kind = 0; kind < 3; ++kind) {
      if (which != string(rules[rule]) + kinds[kind]) continue;
      return rows_of(
          masked_update_table(static_cast<UpdateRule>(rule), static_cast<MaskKind>(kind)));
    }
  }
  if (which == "grad_bool") return rows_of(masked_grad_table(GradOp::kBool));
  if (which == "grad_block") return rows_of(masked_grad_table(GradOp::kBlock));
  if (which == "grad_norm") return rows_of(masked_grad_table(GradOp::kNorm));
  if (which == "prox_blocks") return rows_of(prox_blocks_table());
  if (which == "muon_direction") return rows_of(muon_direction_table());
  fail_value("masked_update_kernels",
             "which must be one of adamw_block, adamw_flat, adamw_bool, sgd_block, sgd_flat, "
             "sgd_bool, grad_bool, grad_block, grad_norm, prox_blocks, muon_direction, got \"" +
                 which + "\"");
}

}  // namespace

void bind_masked_update(py::module_& m) {
  m.def("masked_update_kernels", &kernels, py::arg("which"),
        "The rows of a table (adamw_block, adamw_flat, adamw_bool, sgd_block, sgd_flat, sgd_bool, "
        "grad_bool, grad_block, grad_norm, prox_blocks, muon_direction) in the order they are "
        "tried.");
}

}  // namespace native
}  // namespace nibblock
