// The products with packed weights by themselves, for tests: everything else reaches them through
// the operations that they are part of.
#include "bindings/python.h"
#include "products/packed_matrix.h"
#include "simd/tile_config.h"

#include <memory>

namespace prototok {
namespace {

// A weight (O, I), laid out, and the kernels of the set that was the best one then.
class Packed {
 public:
  Packed(const bf16* weight, int64_t outputs, int64_t inputs)
      : kernels_(*kernels_with_pairs().pairs), matrix_(packed(weight, outputs, inputs)) {}
  const PairKernels& kernels() const { return kernels_; }
  const PackedMatrix& matrix() const { return matrix_; }

 private:
  const PairKernels& kernels_;
  PackedMatrix matrix_;
};

std::unique_ptr<Packed> packed_weight(const View& weight) {
  const auto [outputs, inputs] = weight.sizes<2>();
  require(inputs % 2 == 0, "weight: must have an even number of inputs");
  return std::make_unique<Packed>(weight.data<const bf16>({outputs, inputs}), outputs, inputs);
}

// out (M, O) = [out +] inputs (M, I) weight^T + bias.
void run_product(const Packed& self, const View& inputs, const View& bias, const View& out,
                 bool add, bool few) {
  const int64_t rows = inputs.sizes<2>()[0], I = self.matrix().inputs();
  const int64_t O = self.matrix().outputs();
  const PackedProduct product{inputs.data<const bf16>({rows, I}), self.matrix().data(),
                              bias.data_or_null<const bf16>({O}), out.data<bf16>({rows, O}),
                              rows, I, O, add, few};
  const py::gil_scoped_release others_may_run;
  self.kernels().product(product);
}

// sum (M, O rounded up to panels) = [scale sum +] inputs (M, part) times the weights of that part,
// which begins at input `begin`.
void run_sum(const Packed& self, const View& inputs, const View& scale, const View& sum,
             int64_t begin, bool few) {
  const auto [rows, part] = inputs.sizes<2>();
  const int64_t I = self.matrix().inputs(), O = self.matrix().outputs();
  require(part % 2 == 0 && begin % 2 == 0 && begin >= 0 && begin <= I - part,
          "inputs: must be a part of the weight's, from an even one on, of an even length");
  const int64_t count = rows, length = part;
  const PackedSum product{inputs.data<const bf16>({count, length}),
                          self.matrix().data() + begin * kPanel,
                          sum.data<float>({count, panels_padded(O)}),
                          scale.data_or_null<const float>({count}), count, length, I, O, few};
  const py::gil_scoped_release others_may_run;
  self.kernels().sum(product);
}

// The bytes that LDTILECFG reads for a block of so many rows.
py::bytes tile_config(int rows) {
  require(rows >= 1 && rows <= 2 * kAmxRows, "rows: must be 1 to 32");
  const TileConfig& config = kTileBlockConfigs.of_rows[rows];
  return {reinterpret_cast<const char*>(&config), sizeof config};
}

}  // namespace

void bind_products(py::module_& m) {
  using py::operator""_a;
  const py::kw_only named;
  m.def("tile_config", &tile_config, named, "rows"_a);
  py::class_<Packed>(m, "Packed")
      .def(py::init(&packed_weight), named, "weight"_a)
      .def("product", &run_product, named, "inputs"_a, "bias"_a, "out"_a, "add"_a, "few"_a)
      .def("sum", &run_sum, named, "inputs"_a, "scale"_a, "sum"_a, "begin"_a, "few"_a);
}

}  // namespace prototok
