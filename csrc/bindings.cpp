// The only file that knows of Python. Tensors arrive as addresses: building needs no torch, and
// the callers in kernels/prototok_kernels have checked dtype, shape and contiguity.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void head(Address logits, Address gradient, Address targets, Address token_weight, Address loss,
          Address predicted, Address margin, std::int64_t rows, std::int64_t vocabulary,
          float temperature, bool is_bf16, int threads, const std::string& instruction_set) {
  prototok::Head head;
  head.logits = at<const void>(logits);
  head.gradient = at<void>(gradient);
  head.targets = at<const std::int64_t>(targets);
  head.token_weight = at<const float>(token_weight);
  head.temperature = temperature;
  head.rows = rows;
  head.vocabulary = vocabulary;
  head.element = is_bf16 ? prototok::Element::bf16 : prototok::Element::f32;
  head.loss = at<float>(loss);
  head.predicted = at<std::int64_t>(predicted);
  head.margin = at<float>(margin);
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

void matvec(Address weight, Address inputs, Address bias, Address out, std::int64_t rows,
            std::int64_t input_size, std::int64_t outputs, std::int64_t input_stride,
            std::int64_t stride, bool add, bool is_bf16, int threads,
            const std::string& instruction_set) {
  prototok::Matvec matvec;
  matvec.weight = at<const void>(weight);
  matvec.inputs = at<const void>(inputs);
  matvec.bias = at<const void>(bias);
  matvec.out = at<void>(out);
  matvec.input_stride = input_stride;
  matvec.shape = {rows, input_size, outputs, stride, add};
  matvec.element = is_bf16 ? prototok::Element::bf16 : prototok::Element::f32;
  prototok::matvec(matvec, prototok::kernels_for(instruction_set), threads);
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
  m.def("matvec", &matvec, "weight"_a, "inputs"_a, "bias"_a, "out"_a, "rows"_a, "input_size"_a,
        "outputs"_a, "input_stride"_a, "stride"_a, "add"_a, "is_bf16"_a, "threads"_a,
        "instruction_set"_a = "");
}
