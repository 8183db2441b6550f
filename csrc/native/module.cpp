// nibblock._native: what can be asked of this package without torch. Sources: DESIGN rule 4 in
// csrc/README.md; the parts are bound in linear.cpp, quantize.cpp and ceilings.cpp.
#include "native.h"

namespace nibblock {
namespace native {
namespace {

py::dict features() {
  const CpuFeatures& f = cpu_features();
  py::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512dq"] = f.avx512dq;
  d["avx512vl"] = f.avx512vl;
  d["avx512_vnni"] = f.avx512_vnni;
  d["avx512_bf16"] = f.avx512_bf16;
  d["avx512_fp16"] = f.avx512_fp16;
  d["amx_tile"] = f.amx_tile;
  d["amx_int8"] = f.amx_int8;
  d["amx_bf16"] = f.amx_bf16;
  return d;
}

void set_isa(const std::string& name) {
  Isa isa;
  if (!isa_from_name(name.c_str(), &isa)) {
    fail_value("set_cpu_isa",
               "name must be one of scalar, avx2, avx512, avx512_vnni, amx, got " + name);
  }
  if (!set_cpu_isa(isa)) {
    fail_value("set_cpu_isa", "name must be at most " + std::string(isa_name(cpu_isa_max())) +
                                  " on this CPU, got " + name);
  }
}

py::dict build_facts() {
  py::dict d;
  d["compiler"] = __VERSION__;
  d["cplusplus"] = static_cast<long>(__cplusplus);
  d["pybind11"] =
      PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  d["python"] = PY_VERSION;
  return d;
}

}  // namespace

void bind_features(py::module_& m) {
  m.def("cpu_features", &features,
        "Features this CPU and its operating system allow: name -> bool.");
  m.def(
      "cpu_isa", [] { return isa_name(cpu_isa()); },
      "The level in force: the CPU's, lowered by NIBBLOCK_ISA or set_cpu_isa.");
  m.def(
      "cpu_isa_max", [] { return isa_name(cpu_isa_max()); }, "The highest level this CPU allows.");
  m.def("cpu_isa_error", &cpu_isa_error, "Why NIBBLOCK_ISA cannot be honoured, or None.");
  m.def("set_cpu_isa", &set_isa, py::arg("name"),
        "Lowers (or restores) the level for this process; ValueError above the CPU's.");
  m.def("build_info", &build_facts, "Facts of this module's build: compiler, pybind11, Python.");
}

}  // namespace native
}  // namespace nibblock

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "CPU features, quantise, pack and unpack, and every int4 kernel by name. NumPy in and out.";
  nibblock::native::bind_features(m);
  nibblock::native::bind_int4_linear(m);
  nibblock::native::bind_block_sparse(m);
  nibblock::native::bind_block_select(m);
  nibblock::native::bind_block_scores(m);
  nibblock::native::bind_masked_update(m);
  nibblock::native::bind_quantize(m);
  nibblock::native::bind_ceilings(m);
}
