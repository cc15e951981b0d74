// The collapsed first layer, for Python.
#include "bindings/python.h"
#include "engines/first_layer.h"

#include <memory>
#include <string>

namespace prototok {
namespace {

// `weights`: by the fields of a FirstLayerModel.
std::unique_ptr<FirstLayer> first_layer(const py::dict& weights, int64_t heads, int64_t kv_heads,
                                        int64_t head_size, const std::string& activation,
                                        bool gated, float eps, float scaling) {
  const auto of = [&](const char* name) { return field(weights, name); };
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
          "heads: must be a multiple of kv_heads");
  const auto [hidden, inner] = of("down").sizes<2>();
  const int64_t mixed = heads * head_size, stacked = mixed + 2 * kv_heads * head_size;
  const int64_t up = gated ? 2 * inner : inner;
  using Weight = const bf16;
  const FirstLayerModel model{
      hidden, heads, kv_heads, head_size, {inner, activation_of(activation), gated}, !gated, eps,
      scaling,
      of("input_norm").data<Weight>({hidden}),
      gated ? of("input_norm_bias").data_or_null<Weight>({hidden})
            : of("input_norm_bias").data<Weight>({hidden}),
      of("qkv").data<Weight>({stacked, hidden}),
      of("qkv_bias").data_or_null<Weight>({stacked}),
      of("q_norm").data_or_null<Weight>({head_size}),
      of("k_norm").data_or_null<Weight>({head_size}),
      of("out").data<Weight>({hidden, mixed}),
      of("out_bias").data_or_null<Weight>({hidden}),
      of("norm").data<Weight>({hidden}),
      of("up").data<Weight>({up, hidden}),
      of("up_bias").data_or_null<Weight>({up}),
      of("down").data<Weight>({hidden, inner}),
      of("down_bias").data_or_null<Weight>({hidden})};
  const py::gil_scoped_release others_may_run;
  return std::make_unique<FirstLayer>(model);
}

// `prefix` as a block keeps it, and what the steps from its first vector to the others become.
std::unique_ptr<FirstLayer> first_layer_behind(const FirstLayer& self, const View& prefix,
                                               const View& shift, const View& fixed,
                                               const View& centred, const View& projected) {
  const FirstLayerModel& m = self.model();
  const int64_t length = prefix.sizes<4>()[2], steps = m.heads * (length - 1);
  require(length >= 1, "prefix: must have at least 1 position");
  const FirstLayerPrefix given{length,
                               prefix.data<const bf16>({2, m.kv_heads, length, m.head_size}),
                               shift.data<const float>({m.hidden}),
                               fixed.data<const float>({steps, m.hidden}),
                               centred.data<const float>({steps, m.hidden}),
                               projected.data<const float>({steps, self.wide()})};
  return std::make_unique<FirstLayer>(self, given);
}

// What both directions read, of (R, d) e and m and N positions.
FirstLayerTexts first_layer_texts(const FirstLayer& self, int64_t length, const View& e,
                                            const View& m, const View& saved, const View& cos,
                                            const View& sin) {
  const int64_t rows = e.sizes<2>()[0], hidden = self.model().hidden;
  require(length >= 1, "out: must have at least 1 position");
  FirstLayerTexts texts{};
  texts.e = e.data<const float>({rows, hidden});
  texts.m = m.data<const float>({rows, hidden});
  texts.saved = saved.data<float>({rows, self.saved_floats(length)});
  texts.rotary = rotary_size(cos, self.model().head_size);
  const int64_t seen = self.model().front.length + length;
  texts.cos = cos.rows<const float>({seen, texts.rotary});
  texts.sin = sin.rows<const float>({seen, texts.rotary});
  return texts;
}

void first_layer_forward(const FirstLayer& self, const View& e, const View& m, const View& saved,
                         const View& cos, const View& sin, const View& out, Threads threads) {
  const auto [rows, length, hidden] = out.sizes<3>();
  FirstLayerTexts texts = first_layer_texts(self, length, e, m, saved, cos, sin);
  texts.out = out.data<bf16>({e.shape[0], length, self.model().hidden});
  const int64_t count = e.shape[0], positions = length;
  const py::gil_scoped_release others_may_run;
  self.forward(texts, count, positions, threads);
}

void first_layer_backward(const FirstLayer& self, const View& e, const View& m, const View& saved,
                          const View& cos, const View& sin, const View& grad, const View& grad_e,
                          const View& grad_m, Threads threads) {
  const int64_t length = grad.sizes<3>()[1], hidden = self.model().hidden;
  FirstLayerTexts texts = first_layer_texts(self, length, e, m, saved, cos, sin);
  const int64_t rows = e.shape[0];
  texts.grad = grad.data<const bf16>({rows, length, hidden});
  texts.grad_e = grad_e.data<float>({rows, hidden});
  texts.grad_m = grad_m.data<float>({rows, hidden});
  const py::gil_scoped_release others_may_run;
  self.backward(texts, rows, length, threads);
}

}  // namespace

void bind_first_layer(py::module_& m) {
  using py::operator""_a;
  const py::kw_only named;
  py::class_<FirstLayer>(m, "FirstLayer")
      .def(py::init(&first_layer), named, "weights"_a, "heads"_a, "kv_heads"_a, "head_size"_a,
           "activation"_a, "gated"_a, "eps"_a, "scaling"_a, py::keep_alive<1, 2>())
      .def("behind", &first_layer_behind, named, "prefix"_a, "shift"_a, "fixed"_a, "centred"_a,
           "projected"_a, py::keep_alive<0, 1>())
      .def("saved_floats", &FirstLayer::saved_floats, named, "length"_a)
      .def("forward", &first_layer_forward, named, "e"_a, "m"_a, "saved"_a, "cos"_a, "sin"_a,
           "out"_a, "threads"_a)
      .def("backward", &first_layer_backward, named, "e"_a, "m"_a, "saved"_a, "cos"_a, "sin"_a,
           "grad"_a, "grad_e"_a, "grad_m"_a, "threads"_a);
}

}  // namespace prototok
