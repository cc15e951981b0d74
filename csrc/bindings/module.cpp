#include "bindings/python.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels; the public operations are in prototok_kernels.";
  m.def("instruction_sets", &prototok::instruction_sets);
  m.def("missing_instruction_sets", &prototok::missing_instruction_sets);
  m.def("prefer_instruction_set", &prototok::prefer_instruction_set, pybind11::kw_only(),
        pybind11::arg("name"));
  prototok::bind_ops(m);
  prototok::bind_engines(m);
  prototok::bind_first_layer(m);
  prototok::bind_products(m);
}
