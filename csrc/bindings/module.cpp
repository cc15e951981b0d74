#include "bindings/python.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels; the public operations are in prototok_kernels.";
  m.def("instruction_sets", &prototok::instruction_sets);
  prototok::bind_ops(m);
  prototok::bind_engines(m);
}
