#include <pybind11/pybind11.h>

namespace xorl {
void register_bucket_broadcast(pybind11::module_& module);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Bucketed weight broadcast over a c10d process group.";
  xorl::register_bucket_broadcast(module);
}
