#include "bindings/python.h"
#include "simd/tile_config.h"

namespace {

namespace py = pybind11;
using py::operator""_a;

// The bytes that LDTILECFG reads for a block of so many rows.
py::bytes tile_config(int rows) {
  prototok::require(rows >= 1 && rows <= 2 * prototok::kAmxRows, "rows: must be 1 to 32");
  const auto& config = prototok::kTileBlockConfigs.of_rows[rows];
  return {reinterpret_cast<const char*>(&config), sizeof config};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels; the public operations are in prototok_kernels.";
  m.def("instruction_sets", &prototok::instruction_sets);
  m.def("missing_instruction_sets", &prototok::missing_instruction_sets);
  m.def("prefer_instruction_set", &prototok::prefer_instruction_set, py::kw_only(), "name"_a);
  m.def("tile_config", &tile_config, py::kw_only(), "rows"_a);
  prototok::bind_ops(m);
  prototok::bind_engines(m);
}
