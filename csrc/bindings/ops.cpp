// The operations over whole tensors, for Python.
#include "bindings/python.h"

#include <utility>

namespace prototok {
namespace {

void run_head(const View& logits, const View& gradient, const View& targets, const View& token_weight,
          const View& loss, const View& predicted, const View& margin, float temperature,
          Threads threads, const std::string& instruction_set) {
  const auto [rows, vocabulary] = logits.sizes<2>();
  Head head =
      head_of(rows, targets, token_weight, loss, predicted, margin, temperature);
  head.vocabulary = vocabulary;
  head.element = logits.element();
  head.logits = logits.data(head.element, {rows, vocabulary});
  head.gradient = gradient.data_or_null(head.element, {rows, vocabulary});
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  prototok::head(head, kernels, threads);
}

void run_adamw(const View& param, const View& grad, const View& exp_avg, const View& exp_avg_sq,
           const View& step, const View& lr, const View& active, std::pair<double, double> betas,
           double eps, double weight_decay, Threads threads, const std::string& instruction_set) {
  const auto [rows, coordinates] = param.sizes<2>();
  const AdamW adamw{param.data<float>({rows, coordinates}),
                              grad.data<const float>({rows, coordinates}),
                              exp_avg.data<float>({rows, coordinates}),
                              exp_avg_sq.data<float>({rows, coordinates}),
                              step.data<int64_t>({rows}),
                              lr.data<const float>({rows}),
                              reinterpret_cast<const std::uint8_t*>(active.data<const bool>({rows})),
                              rows, coordinates, betas.first, betas.second, eps, weight_decay};
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  prototok::adamw(adamw, kernels, threads);
}

void run_residual_norm(const View& x, const View& delta, const View& sum, const View& normed,
                   const View& weight, const View& bias, const View& statistics, float eps,
                   Threads threads, const std::string& instruction_set) {
  const Element element = x.element();
  const auto [rows, width] = x.merged().sizes<2>();
  const ResidualNorm norm{x.merged().data(element, {rows, width}),
                                    delta.merged().data_or_null(element, {rows, width}),
                                    sum.merged().data_or_null(element, {rows, width}),
                                    normed.merged().data(element, {rows, width}),
                                    weight.data(element, {width}),
                                    bias.data_or_null(element, {width}),
                                    statistics.data<float>({rows, 2}),
                                    rows, width, eps, element};
  require(delta.given == sum.given, "sum: must be given exactly where delta is");
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  residual_norm(norm, kernels, threads);
}

void run_residual_norm_backward(const View& grad_sum, const View& grad_normed, const View& sum,
                            const View& weight, const View& statistics, const View& grad,
                            bool centred, Threads threads, const std::string& instruction_set) {
  const Element element = sum.element();
  const auto [rows, width] = sum.merged().sizes<2>();
  const ResidualNormBackward norm{
      grad_sum.merged().data_or_null(element, {rows, width}),
      grad_normed.merged().data(element, {rows, width}),
      sum.merged().data(element, {rows, width}),
      weight.data(element, {width}),
      statistics.data<const float>({rows, 2}),
      grad.merged().data(element, {rows, width}),
      rows, width, centred, element};
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  residual_norm_backward(norm, kernels, threads);
}

void run_activation(const View& grad, const View& z, const View& bias, const View& out,
                const std::string& kind, bool gated, Threads threads,
                const std::string& instruction_set) {
  const Element element = z.element();
  const auto [rows, wide] = z.merged().sizes<2>();
  require(!gated || wide % 2 == 0, "z: must have two halves where gated");
  const int64_t inner = gated ? wide / 2 : wide;
  const ActivationPass pass{grad.merged().data_or_null(element, {rows, inner}),
                                      z.merged().data(element, {rows, wide}),
                                      bias.data_or_null(element, {wide}),
                                      out.merged().data(element, {rows, grad.given ? wide : inner}),
                                      rows, {inner, activation_of(kind), gated}, element};
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  activation(pass, kernels, threads);
}

void run_attention(const View& qkv, const View& grad_out, const View& out, const View& cos,
               const View& sin, const View& prefix, int64_t heads, int64_t kv_heads,
               int64_t window, float scaling, Threads threads, const std::string& instruction_set) {
  const Element element = qkv.element();
  const auto [rows, length, width] = qkv.sizes<3>();
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
          "heads: must be a multiple of kv_heads");
  require(width % (heads + 2 * kv_heads) == 0, "qkv: must hold heads of one size");
  require(window >= 1, "window: must be at least 1 position");
  const int64_t size = width / (heads + 2 * kv_heads), mixed = heads * size;
  const int64_t rotary = rotary_size(cos, size), front = prefix.given ? prefix.sizes<4>()[2] : 0;
  const Attention attention{
      qkv.data(element, {rows, length, width}),
      grad_out.data_or_null(element, {rows, length, mixed}),
      out.data(element, {rows, length, grad_out.given ? width : mixed}),
      rows,
      {length, heads, kv_heads, size, rotary, window, scaling,
       cos.rows<const float>({length, rotary}), sin.rows<const float>({length, rotary}), rotary,
       front, prefix.data_or_null(element, {2, kv_heads, front, size})},
      element};
  const Kernels& kernels = kernels_for(instruction_set);
  const py::gil_scoped_release others_may_run;
  prototok::attention(attention, kernels, threads);
}

}  // namespace

void bind_ops(py::module_& m) {
  using py::operator""_a;
  const py::kw_only named;
  m.def("head", &run_head, named, "logits"_a, "gradient"_a, "targets"_a, "token_weight"_a, "loss"_a,
        "predicted"_a, "margin"_a, "temperature"_a, "threads"_a, "instruction_set"_a = "");
  m.def("adamw", &run_adamw, named, "param"_a, "grad"_a, "exp_avg"_a, "exp_avg_sq"_a, "step"_a, "lr"_a,
        "active"_a, "betas"_a, "eps"_a, "weight_decay"_a, "threads"_a, "instruction_set"_a = "");
  m.def("residual_norm", &run_residual_norm, named, "x"_a, "delta"_a, "sum"_a, "normed"_a, "weight"_a,
        "bias"_a, "statistics"_a, "eps"_a, "threads"_a, "instruction_set"_a = "");
  m.def("residual_norm_backward", &run_residual_norm_backward, named, "grad_sum"_a, "grad_normed"_a,
        "sum"_a, "weight"_a, "statistics"_a, "grad"_a, "centred"_a, "threads"_a,
        "instruction_set"_a = "");
  m.def("activation", &run_activation, named, "grad"_a, "z"_a, "bias"_a, "out"_a, "kind"_a, "gated"_a,
        "threads"_a, "instruction_set"_a = "");
  m.def("attention", &run_attention, named, "qkv"_a, "grad_out"_a, "out"_a, "cos"_a, "sin"_a,
        "prefix"_a, "heads"_a, "kv_heads"_a, "window"_a, "scaling"_a, "threads"_a, "instruction_set"_a = "");
}

}  // namespace prototok
