// The Python module vitadapter_ext._C: it says how this library was built. The operators register themselves when it is
// loaded (adapter.cpp, arc.cpp). This file alone knows pybind11, and it knows no torch header.
#include <pybind11/pybind11.h>

#include "../cpu/level.h"
#include "vitadapter_build_config.h"  // written by setup.py

namespace py = pybind11;
namespace cpu = vitadapter::cpu;

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    py::dict info;
    info["version"] = VITADAPTER_VERSION;
    info["torch_version"] = VITADAPTER_TORCH_VERSION;
    info["cxx_compiler"] = VITADAPTER_CXX_COMPILER;
    info["cuda_version"] = VITADAPTER_CUDA_VERSION;
    info["cuda_architectures"] = VITADAPTER_CUDA_ARCHITECTURES;
    info["cuda_toolkit"] = VITADAPTER_CUDA_TOOLKIT;
    info["cuda_off_reason"] = VITADAPTER_CUDA_OFF_REASON;
    return info;
  });
  module.def("cpu_level", [] { return cpu::name(cpu::level()); });
  module.def("cpu_levels", [] {
    py::list names;
    for (cpu::Level level : cpu::supported_levels()) names.append(cpu::name(level));
    return names;
  });
  module.def("use_cpu_level", &cpu::use_level);
}
