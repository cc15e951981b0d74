// The only file that knows of Python. Tensors arrive as addresses: building needs no torch, and
// the callers in kernels/prototok_kernels have checked dtype, shape and contiguity.
#include "engines/decoder.h"
#include "engines/decoder_blocks.h"
#include "engines/first_layer.h"
#include "engines/packed_head.h"
#include "ops/ops.h"
#include "targets/dispatch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <utility>

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

prototok::Head head_of(Address targets, Address token_weight, Address loss, Address predicted,
                       Address margin, std::int64_t rows, float temperature) {
  prototok::Head head{};
  head.targets = at<const std::int64_t>(targets);
  head.token_weight = at<const float>(token_weight);
  head.temperature = temperature;
  head.rows = rows;
  head.element = prototok::Element::bf16;
  head.loss = at<float>(loss);
  head.predicted = at<std::int64_t>(predicted);
  head.margin = at<float>(margin);
  return head;
}

void head(Address logits, Address gradient, Address targets, Address token_weight, Address loss,
          Address predicted, Address margin, std::int64_t rows, std::int64_t vocabulary,
          float temperature, bool is_bf16, int threads, const std::string& instruction_set) {
  prototok::Head head =
      head_of(targets, token_weight, loss, predicted, margin, rows, temperature);
  head.logits = at<const void>(logits);
  head.gradient = at<void>(gradient);
  head.vocabulary = vocabulary;
  head.element = is_bf16 ? prototok::Element::bf16 : prototok::Element::f32;
  prototok::head(head, prototok::kernels_for(instruction_set), threads);
}

void adamw(Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address step,
           Address lr, Address active, std::int64_t rows, std::int64_t coordinates,
           std::pair<double, double> betas, double eps, double weight_decay, int threads,
           const std::string& instruction_set) {
  prototok::AdamW adamw;
  adamw.param = at<float>(param);
  adamw.grad = at<const float>(grad);
  adamw.exp_avg = at<float>(exp_avg);
  adamw.exp_avg_sq = at<float>(exp_avg_sq);
  adamw.step = at<std::int64_t>(step);
  adamw.lr = at<const float>(lr);
  adamw.active = at<const std::uint8_t>(active);
  adamw.rows = rows;
  adamw.coordinates = coordinates;
  adamw.beta1 = betas.first;
  adamw.beta2 = betas.second;
  adamw.eps = eps;
  adamw.weight_decay = weight_decay;
  prototok::adamw(adamw, prototok::kernels_for(instruction_set), threads);
}

prototok::Activation activation_of(const std::string& name) {
  if (name == "silu") return prototok::Activation::silu;
  if (name == "gelu") return prototok::Activation::gelu;
  if (name == "gelu_tanh") return prototok::Activation::gelu_tanh;
  if (name == "relu") return prototok::Activation::relu;
  throw std::invalid_argument("activation: '" + name + "' is unknown");
}

// `blocks`: the addresses of a DecoderBlock in its order, then the window.
prototok::DecoderModel decoder_model(
    const std::vector<std::array<Address, 15>>& blocks, Address norm, Address norm_bias,
    Address head, Address embedding, Address cos, Address sin, std::int64_t hidden,
    std::int64_t heads, std::int64_t kv_heads, std::int64_t head_size, std::int64_t rotated,
    std::int64_t inner, std::int64_t vocabulary, float scaling, float eps,
    const std::string& activation, bool gated, bool parallel, bool is_bf16) {
  prototok::DecoderModel model;
  for (const auto& b : blocks) {
    const auto address = [&](int i) { return at<const void>(b[std::size_t(i)]); };
    model.blocks.push_back({address(0), address(1), address(2), address(3), address(4), address(5),
                            address(6), address(7), address(8), address(9), address(10),
                            address(11), address(12), address(13), std::int64_t(b[14])});
  }
  model.norm = at<const void>(norm);
  model.norm_bias = at<const void>(norm_bias);
  model.head = at<const void>(head);
  model.embedding = at<const void>(embedding);
  model.cos = at<const float>(cos);
  model.sin = at<const float>(sin);
  model.hidden = hidden;
  model.heads = heads;
  model.kv_heads = kv_heads;
  model.head_size = head_size;
  model.rotated = rotated;
  model.inner = inner;
  model.vocabulary = vocabulary;
  model.scaling = scaling;
  model.eps = eps;
  model.activation = activation_of(activation);
  model.gated = gated;
  model.parallel = parallel;
  model.is_bf16 = is_bf16;
  return model;
}

// `weights`: the addresses of a FirstLayerModel in its order. `sizes`: hidden, heads, key-value
// heads, head size, inner.
std::unique_ptr<prototok::FirstLayer> first_layer(const std::array<Address, 13>& weights,
                                                  const std::array<std::int64_t, 5>& sizes,
                                                  const std::string& activation, bool gated,
                                                  float eps, float scaling) {
  const auto address = [&](int i) { return at<const prototok::bf16>(weights[std::size_t(i)]); };
  const auto [hidden, heads, kv_heads, head_size, inner] = sizes;
  return std::make_unique<prototok::FirstLayer>(prototok::FirstLayerModel{
      hidden, heads, kv_heads, head_size, {inner, activation_of(activation), gated}, !gated, eps,
      scaling, address(0), address(1), address(2), address(3), address(4), address(5), address(6),
      address(7), address(8), address(9), address(10), address(11), address(12)});
}

// The stream and the products of a block's input, 0 where not given.
using BlockAddresses = std::array<Address, 3>;

template <class T>
prototok::BlockInput<T> block_input(const BlockAddresses& of) {
  return {at<T>(of[0]), at<T>(of[1]), at<T>(of[2])};
}

// texts, length, the first block, texts a tile.
prototok::BlocksInput blocks_input(const BlockAddresses& of,
                                   const std::array<std::int64_t, 4>& shape, Address cos,
                                   Address sin, std::int64_t table_row) {
  const auto [texts, length, first, tile] = shape;
  return {first, texts, length, tile, at<const float>(cos), at<const float>(sin), table_row,
          block_input<const prototok::bf16>(of)};
}

prototok::Element element_of(bool is_bf16) {
  return is_bf16 ? prototok::Element::bf16 : prototok::Element::f32;
}

void residual_norm(Address x, Address delta, Address sum, Address normed, Address weight,
                   Address bias, Address statistics, std::int64_t rows, std::int64_t coordinates,
                   float eps, bool is_bf16, int threads, const std::string& instruction_set) {
  prototok::residual_norm({at<const void>(x), at<const void>(delta), at<void>(sum),
                           at<void>(normed), at<const void>(weight), at<const void>(bias),
                           at<float>(statistics), rows, coordinates, eps, element_of(is_bf16)},
                          prototok::kernels_for(instruction_set), threads);
}

void residual_norm_backward(Address grad_sum, Address grad_normed, Address sum, Address weight,
                            Address statistics, Address grad, std::int64_t rows,
                            std::int64_t coordinates, bool centred, bool is_bf16, int threads,
                            const std::string& instruction_set) {
  prototok::residual_norm_backward(
      {at<const void>(grad_sum), at<const void>(grad_normed), at<const void>(sum),
       at<const void>(weight), at<const float>(statistics), at<void>(grad), rows, coordinates,
       centred, element_of(is_bf16)},
      prototok::kernels_for(instruction_set), threads);
}

void activation(Address grad, Address z, Address bias, Address out, std::int64_t rows,
                std::int64_t inner, const std::string& kind, bool gated, bool is_bf16, int threads,
                const std::string& instruction_set) {
  prototok::activation({at<const void>(grad), at<const void>(z), at<const void>(bias),
                        at<void>(out), rows, {inner, activation_of(kind), gated},
                        element_of(is_bf16)},
                       prototok::kernels_for(instruction_set), threads);
}

// shape: length, heads, key-value heads, head size, rotary size, window.
void attention(Address qkv, Address grad_out, Address out, std::int64_t rows,
               const std::array<std::int64_t, 6>& shape, Address cos, Address sin,
               std::int64_t table_row, float scaling, bool is_bf16, int threads,
               const std::string& instruction_set) {
  const auto [length, heads, kv_heads, size, rotary, window] = shape;
  prototok::attention({at<const void>(qkv), at<const void>(grad_out), at<void>(out), rows,
                       {length, heads, kv_heads, size, rotary, window, scaling,
                        at<const float>(cos), at<const float>(sin), table_row},
                       element_of(is_bf16)},
                      prototok::kernels_for(instruction_set), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using py::operator""_a;
  m.doc() = "The CPU kernels; the public operations are in prototok_kernels.";
  m.def("instruction_sets", &prototok::instruction_sets);
  m.def("head", &head, py::kw_only(), "logits"_a, "gradient"_a, "targets"_a, "token_weight"_a,
        "loss"_a, "predicted"_a, "margin"_a, "rows"_a, "vocabulary"_a, "temperature"_a,
        "is_bf16"_a, "threads"_a, "instruction_set"_a = "",
        py::call_guard<py::gil_scoped_release>());
  m.def("adamw", &adamw, py::kw_only(), "param"_a, "grad"_a, "exp_avg"_a, "exp_avg_sq"_a, "step"_a,
        "lr"_a, "active"_a, "rows"_a, "coordinates"_a, "betas"_a, "eps"_a, "weight_decay"_a,
        "threads"_a, "instruction_set"_a = "", py::call_guard<py::gil_scoped_release>());
  using prototok::PackedHead;
  py::class_<PackedHead>(m, "PackedHead")
      .def(py::init([](Address weight, std::int64_t vocabulary, std::int64_t hidden) {
             return std::make_unique<PackedHead>(at<const prototok::bf16>(weight), vocabulary,
                                                 hidden); }),
           "weight"_a, "vocabulary"_a, "hidden"_a)
      .def("workspace_bytes", &PackedHead::workspace_bytes, "tile"_a)
      .def("run", [](PackedHead& self, Address hidden, Address grad_hidden, Address targets,
                     Address token_weight, Address loss, Address predicted, Address margin,
                     std::int64_t rows, float temperature, std::int64_t tile, int threads) {
             self.run(at<const prototok::bf16>(hidden), at<prototok::bf16>(grad_hidden),
                      head_of(targets, token_weight, loss, predicted, margin, rows, temperature),
                      tile, threads); },
           py::kw_only(), "hidden"_a, "grad_hidden"_a, "targets"_a, "token_weight"_a, "loss"_a,
           "predicted"_a, "margin"_a, "rows"_a, "temperature"_a, "tile"_a, "threads"_a,
           py::call_guard<py::gil_scoped_release>());
  using prototok::Decoder;
  using prototok::DecoderBlocks;
  using prototok::DecoderModel;
  py::class_<DecoderModel>(m, "DecoderModel")
      .def(py::init(&decoder_model), py::kw_only(), "blocks"_a, "norm"_a, "norm_bias"_a, "head"_a,
           "embedding"_a, "cos"_a, "sin"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_size"_a,
           "rotated"_a, "inner"_a, "vocabulary"_a, "scaling"_a, "eps"_a, "activation"_a, "gated"_a,
           "parallel"_a, "is_bf16"_a);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<DecoderModel, std::int64_t, std::int64_t, std::int64_t, std::string>(),
           "model"_a, "rows"_a, "positions"_a, "longest_pass"_a, "instruction_set"_a = "")
      .def("pass_", [](Decoder& self, Address inputs, std::int64_t length, std::int64_t start,
                       int threads) { self.pass(at<const float>(inputs), length, start, threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("logits", [](Decoder& self, Address out, int threads) {
             self.logits(at<float>(out), threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("predict", [](Decoder& self, Address ids, bool every, int threads) {
             self.predict(at<std::int64_t>(ids), every, threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("generate", [](Decoder& self, Address ids, std::int64_t begin, std::int64_t end,
                          std::int64_t start, int threads) {
             self.generate(at<std::int64_t>(ids), begin, end, start, threads); },
           py::call_guard<py::gil_scoped_release>());
  py::class_<DecoderBlocks>(m, "DecoderBlocks")
      .def(py::init<DecoderModel>(), "model"_a, py::call_guard<py::gil_scoped_release>())
      .def("saved_bytes", [](const DecoderBlocks& self, const std::array<std::int64_t, 4>& shape) {
             return self.saved_bytes(blocks_input({}, shape, 0, 0, 0)); })
      .def("forward", [](const DecoderBlocks& self, const BlockAddresses& of, Address out,
                         Address saved, const std::array<std::int64_t, 4>& shape, Address cos,
                         Address sin, std::int64_t table_row, int threads) {
             self.forward(blocks_input(of, shape, cos, sin, table_row), at<prototok::bf16>(out),
                          at<unsigned char>(saved), threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("backward", [](DecoderBlocks& self, const BlockAddresses& of, Address grad,
                          const BlockAddresses& grads, Address saved,
                          const std::array<std::int64_t, 4>& shape, Address cos, Address sin,
                          std::int64_t table_row, int threads) {
             self.backward(blocks_input(of, shape, cos, sin, table_row),
                           at<const prototok::bf16>(grad), block_input<prototok::bf16>(grads),
                           at<unsigned char>(saved), threads); },
           py::call_guard<py::gil_scoped_release>());
  using prototok::bf16;
  using prototok::FirstLayer;
  const auto texts = [](Address e, Address m, Address saved, Address cos, Address sin,
                        std::int64_t rotary) {
    prototok::FirstLayerTexts texts{};
    texts.e = at<const float>(e);
    texts.m = at<const float>(m);
    texts.saved = at<float>(saved);
    texts.cos = at<const float>(cos);
    texts.sin = at<const float>(sin);
    texts.rotary = rotary;
    return texts;
  };
  py::class_<FirstLayer>(m, "FirstLayer")
      .def(py::init(&first_layer), py::kw_only(), "weights"_a, "sizes"_a, "activation"_a, "gated"_a,
           "eps"_a, "scaling"_a)
      .def("saved_floats", &FirstLayer::saved_floats, "length"_a)
      .def("forward", [texts](const FirstLayer& self, Address e, Address m, Address saved,
                              Address cos, Address sin, std::int64_t rotary, Address out,
                              std::int64_t rows, std::int64_t length, int threads) {
             auto all = texts(e, m, saved, cos, sin, rotary);
             all.out = at<bf16>(out);
             self.forward(all, rows, length, threads); },
           py::call_guard<py::gil_scoped_release>())
      .def("backward", [texts](FirstLayer& self, Address e, Address m, Address saved, Address cos,
                               Address sin, std::int64_t rotary, Address grad, Address grad_e,
                               Address grad_m, std::int64_t rows, std::int64_t length,
                               int threads) {
             auto all = texts(e, m, saved, cos, sin, rotary);
             all.grad = at<const bf16>(grad);
             all.grad_e = at<float>(grad_e);
             all.grad_m = at<float>(grad_m);
             self.backward(all, rows, length, threads); },
           py::call_guard<py::gil_scoped_release>());
  m.def("residual_norm", &residual_norm, "x"_a, "delta"_a, "sum"_a, "normed"_a, "weight"_a,
        "bias"_a, "statistics"_a, "rows"_a, "coordinates"_a, "eps"_a, "is_bf16"_a, "threads"_a,
        "instruction_set"_a = "");
  m.def("residual_norm_backward", &residual_norm_backward, "grad_sum"_a, "grad_normed"_a, "sum"_a,
        "weight"_a, "statistics"_a, "grad"_a, "rows"_a, "coordinates"_a, "centred"_a, "is_bf16"_a,
        "threads"_a, "instruction_set"_a = "");
  m.def("activation", &activation, "grad"_a, "z"_a, "bias"_a, "out"_a, "rows"_a, "inner"_a,
        "kind"_a, "gated"_a, "is_bf16"_a, "threads"_a, "instruction_set"_a = "");
  m.def("attention", &attention, "qkv"_a, "grad_out"_a, "out"_a, "rows"_a, "shape"_a, "cos"_a,
        "sin"_a, "table_row"_a, "scaling"_a, "is_bf16"_a, "threads"_a, "instruction_set"_a = "",
        py::call_guard<py::gil_scoped_release>());
}
