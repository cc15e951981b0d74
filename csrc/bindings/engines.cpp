// What holds weights laid out for its products, for Python. An object that goes on reading tensors
// keeps their views, and so the tensors, alive (py::keep_alive).
#include "bindings/python.h"
#include "engines/decoder.h"
#include "engines/decoder_blocks.h"
#include "engines/one_forward.h"
#include "engines/packed_head.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace prototok {
namespace {

// ---- the head with packed weights ----

std::unique_ptr<PackedHead> packed_head(const View& weight) {
  const auto [vocabulary, hidden] = weight.sizes<2>();
  const bf16* data = weight.data<const bf16>({vocabulary, hidden});
  const py::gil_scoped_release others_may_run;
  return std::make_unique<PackedHead>(data, vocabulary, hidden);
}

void run_packed_head(PackedHead& self, const View& hidden, const View& grad_hidden,
                     const View& targets, const View& token_weight, const View& loss,
                     const View& predicted, const View& margin, float temperature, int64_t tile,
                     Threads threads) {
  const int64_t rows = hidden.sizes<2>()[0];
  const bf16* inputs = hidden.data<const bf16>({rows, self.hidden()});
  bf16* grad = grad_hidden.data_or_null<bf16>({rows, self.hidden()});
  Head head =
      head_of(rows, targets, token_weight, loss, predicted, margin, temperature);
  head.element = Element::bf16;
  require(tile >= 1, "tile: must be at least 1 row");
  const py::gil_scoped_release others_may_run;
  self.run(inputs, grad, head, tile, threads);
}

// ---- whole decoders ----

// `blocks`: the weights of each by the fields of a DecoderBlock, and its window.
std::shared_ptr<DecoderModel> decoder_model(const std::vector<std::pair<py::dict, int64_t>>& blocks,
                                            const View& norm, const View& norm_bias,
                                            const View& head, const View& embedding, int64_t heads,
                                            int64_t kv_heads, int64_t head_size, int64_t rotated,
                                            float scaling, float eps, const std::string& activation,
                                            bool gated, bool parallel) {
  DecoderModel m{};
  const Element element = norm.element();
  const int64_t hidden = norm.sizes<1>()[0], mixed = heads * head_size;
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
          "heads: must be a multiple of kv_heads");
  require(rotated >= 0 && rotated % 2 == 0 && rotated <= head_size,
          "rotated: must be an even part of a head");
  for (const auto& [weights, window] : blocks) {
    const py::dict& fields = weights;
    const auto of = [&](const char* name) { return field(fields, name); };
    const int64_t inner = of("down").sizes<2>()[1], up = gated ? 2 * inner : inner;
    const int64_t stacked = mixed + 2 * kv_heads * head_size;
    require(m.blocks.empty() || inner == m.inner, "down: must be of one shape in all blocks");
    require(window >= 0, "window: must not be negative");
    m.inner = inner;
    m.blocks.push_back({of("norm").data(element, {hidden}),
                        of("norm_bias").data_or_null(element, {hidden}),
                        of("qkv").data(element, {stacked, hidden}),
                        of("qkv_bias").data_or_null(element, {stacked}),
                        of("q_norm").data_or_null(element, {head_size}),
                        of("k_norm").data_or_null(element, {head_size}),
                        of("out").data(element, {hidden, mixed}),
                        of("out_bias").data_or_null(element, {hidden}),
                        of("mlp_norm").data(element, {hidden}),
                        of("mlp_norm_bias").data_or_null(element, {hidden}),
                        of("up").data(element, {up, hidden}),
                        of("up_bias").data_or_null(element, {up}),
                        of("down").data(element, {hidden, inner}),
                        of("down_bias").data_or_null(element, {hidden}), window});
  }
  m.norm = norm.data(element, {hidden});
  m.norm_bias = norm_bias.data_or_null(element, {hidden});
  m.vocabulary = head.given ? head.sizes<2>()[0] : 0;
  m.head = head.data_or_null(element, {m.vocabulary, hidden});
  m.embedding = embedding.rows_or_null(element, {m.vocabulary, hidden});
  m.hidden = hidden;
  m.heads = heads;
  m.kv_heads = kv_heads;
  m.head_size = head_size;
  m.rotated = rotated;
  m.scaling = scaling;
  m.eps = eps;
  m.activation = activation_of(activation);
  m.gated = gated;
  m.parallel = parallel;
  m.is_bf16 = element == Element::bf16;
  return std::make_shared<DecoderModel>(std::move(m));
}

std::unique_ptr<Decoder> decoder(std::shared_ptr<DecoderModel> model, int64_t rows,
                                 int64_t positions, int64_t longest_pass, const View& cos,
                                 const View& sin, const std::string& instruction_set) {
  require(model->head != nullptr && model->embedding != nullptr,
          "model: must have a head and an embedding");
  require(rows >= 1 && longest_pass >= 1, "rows: must be at least 1, as longest_pass must");
  const RotaryTable table{cos.rows<const float>({positions, model->rotated}),
                          sin.rows<const float>({positions, model->rotated}), model->rotated,
                          model->rotated};
  const DecoderRoom room{rows, positions, longest_pass, table};
  const py::gil_scoped_release others_may_run;
  return std::make_unique<Decoder>(std::move(model), room, instruction_set);
}

void decoder_pass(Decoder& self, const View& inputs, int64_t start, Threads threads) {
  const auto [rows, length, hidden] = inputs.sizes<3>();
  const float* data = inputs.data<const float>({rows, length, self.model().hidden});
  require(rows >= 1 && length >= 1 && start >= 0,
          "start: must not be negative, and inputs not be empty");
  const py::gil_scoped_release others_may_run;
  self.pass(data, rows, length, start, threads);
}

void decoder_logits(Decoder& self, const View& out, Threads threads) {
  require(self.length() > 0, "out: there is no pass yet");
  float* data = out.data<float>({self.rows(), self.length(), self.model().vocabulary});
  const py::gil_scoped_release others_may_run;
  self.logits(data, threads);
}

// (R, P): behind every position of the last pass; (R,): behind the last one.
void decoder_predict(Decoder& self, const View& ids, Threads threads) {
  require(self.length() > 0, "ids: there is no pass yet");
  const bool every = ids.rank == 2;
  int64_t* data = every ? ids.data<int64_t>({self.rows(), self.length()})
                        : ids.data<int64_t>({self.rows()});
  const py::gil_scoped_release others_may_run;
  self.predict(data, every, threads);
}

void decoder_generate(Decoder& self, const View& ids, int64_t begin, int64_t start,
                      Threads threads) {
  const int64_t end = ids.sizes<2>()[0], rows = self.rows();
  int64_t* data = ids.data<int64_t>({end, rows});
  require(begin >= 1 && begin <= end, "begin: must be a row of ids behind the first");
  require(start >= 0 && start <= self.positions() - (end - begin),
          "start: the cache has no room for so many positions");
  for (int64_t i = (begin - 1) * rows; i < begin * rows; ++i)
    require(data[i] >= 0 && data[i] < self.model().vocabulary,
            "ids: must be in the vocabulary in front of `begin`");
  const py::gil_scoped_release others_may_run;
  self.generate(data, begin, end, start, threads);
}

std::unique_ptr<DecoderBlocks> decoder_blocks(const DecoderModel& model) {
  const py::gil_scoped_release others_may_run;
  return std::make_unique<DecoderBlocks>(model);
}

// The stream that enters block `first`, and that block's products or neither; or their gradients.
template <class T>
BlockInput<T> block_input(const DecoderModel& m, int64_t texts, int64_t length,
                                    const View& x, const View& qkv, const View& z) {
  const int64_t stacked = (m.heads + 2 * m.kv_heads) * m.head_size;
  return {x.data<T>({texts, length, m.hidden}), qkv.data_or_null<T>({texts, length, stacked}),
          z.data_or_null<T>({texts, length, m.gated ? 2 * m.inner : m.inner})};
}

BlocksInput blocks_shape(const DecoderModel& m, int64_t texts, int64_t length,
                                   int64_t first, int64_t tile) {
  require(texts >= 1 && length >= 1 && tile >= 1, "tile: must be at least 1 text of 1 position");
  require(first >= 0 && first <= int64_t(m.blocks.size()), "first: the model has no such block");
  BlocksInput input{};
  input.first = first;
  input.texts = texts;
  input.length = length;
  input.tile = std::min(tile, texts);
  return input;
}

// Everything but what enters.
BlocksInput blocks_constants(const DecoderModel& m, int64_t texts, int64_t length, const View& cos,
                             const View& sin, const View& prefix, int64_t first, int64_t tile) {
  BlocksInput input = blocks_shape(m, texts, length, first, tile);
  input.cos = cos.rows<const float>({length, m.rotated});
  input.sin = sin.rows<const float>({length, m.rotated});
  input.table_row = m.rotated;
  if (prefix.given) {
    input.front = prefix.sizes<5>()[3];
    input.front_kv = prefix.data<const bf16>(
        {int64_t(m.blocks.size()), 2, m.kv_heads, input.front, m.head_size});
  }
  return input;
}

BlocksInput blocks_input(const DecoderModel& m, const View& x, const View& qkv, const View& z,
                         const View& cos, const View& sin, const View& prefix, int64_t first,
                         int64_t tile) {
  const auto [texts, length, hidden] = x.sizes<3>();
  BlocksInput input = blocks_constants(m, texts, length, cos, sin, prefix, first, tile);
  require(qkv.given == z.given, "z: must be given exactly where qkv is");
  require(!qkv.given || (m.parallel && first < int64_t(m.blocks.size())),
          "qkv: only a parallel block takes its products");
  input.of = block_input<const bf16>(m, texts, length, x, qkv, z);
  return input;
}

void blocks_forward(const DecoderBlocks& self, const View& x, const View& qkv, const View& z,
                    const View& out, const View& saved, const View& cos, const View& sin,
                    const View& prefix, int64_t first, int64_t tile, Threads threads) {
  const DecoderModel& m = self.model();
  const BlocksInput input = blocks_input(m, x, qkv, z, cos, sin, prefix, first, tile);
  bf16* to = out.data<bf16>({input.texts, input.length, m.hidden});
  auto* kept = saved.data_or_null<std::uint8_t>({self.saved_bytes(input)});
  const py::gil_scoped_release others_may_run;
  self.forward(input, to, kept, threads);
}

void blocks_backward(DecoderBlocks& self, const View& x, const View& qkv, const View& z,
                     const View& grad, const View& grad_x, const View& grad_qkv, const View& grad_z,
                     const View& saved, const View& cos, const View& sin, const View& prefix,
                     int64_t first, int64_t tile, Threads threads) {
  const DecoderModel& m = self.model();
  const BlocksInput input = blocks_input(m, x, qkv, z, cos, sin, prefix, first, tile);
  const int64_t texts = input.texts, length = input.length;
  const bf16* of_out = grad.data<const bf16>({texts, length, m.hidden});
  const auto grads = block_input<bf16>(m, texts, length, grad_x, grad_qkv, grad_z);
  require(qkv.given == grad_qkv.given && z.given == grad_z.given,
          "grad_qkv: must be given exactly where qkv is, and grad_z where z is");
  auto* kept = saved.data<std::uint8_t>({self.saved_bytes(input)});
  const py::gil_scoped_release others_may_run;
  self.backward(input, of_out, grads, kept, threads);
}

std::unique_ptr<PreparedForward> one_forward(const DecoderBlocks& blocks, const PackedHead& head,
                                             const View& layout, const View& cos, const View& sin,
                                             const View& prefix) {
  const int64_t length = layout.sizes<1>()[0];
  const int64_t* at = layout.data<const int64_t>({length});
  return std::make_unique<PreparedForward>(
      blocks, head, blocks_constants(blocks.model(), 1, length, cos, sin, prefix, 0, 1),
      std::vector<int64_t>(at, at + length));
}

void one_forward_ids(const PreparedForward& self, const View& vectors, const View& ids,
                     int64_t tile, Threads threads) {
  const auto [texts, slots, hidden] = vectors.sizes<3>();
  require(texts >= 1 && tile >= 1, "tile: must be at least 1 text");
  require(slots >= self.fewest_slots(), "layout: must be of vectors that there are");
  const Element element = vectors.element();
  const void* from = vectors.data(element, {texts, slots, self.hidden()});
  int64_t* to = ids.data<int64_t>({texts, self.length()});
  const py::gil_scoped_release others_may_run;
  if (element == Element::f32)
    self(static_cast<const float*>(from), texts, slots, to, tile, threads);
  else
    self(static_cast<const bf16*>(from), texts, slots, to, tile, threads);
}

}  // namespace

void bind_engines(py::module_& m) {
  using py::operator""_a;
  const py::kw_only named;
  m.attr("BLOCK_POSITIONS") = kBlockPositions;
  m.attr("TILES_FROM") = kTilesFrom;
  py::class_<PackedHead>(m, "PackedHead")
      .def(py::init(&packed_head), named, "weight"_a, py::keep_alive<1, 2>())
      .def("workspace_bytes", &PackedHead::workspace_bytes, named, "tile"_a)
      .def("run", &run_packed_head, named, "hidden"_a, "grad_hidden"_a, "targets"_a,
           "token_weight"_a, "loss"_a, "predicted"_a, "margin"_a, "temperature"_a, "tile"_a,
           "threads"_a);
  py::class_<DecoderModel, std::shared_ptr<DecoderModel>>(m, "DecoderModel")
      .def(py::init(&decoder_model), named, "blocks"_a, "norm"_a, "norm_bias"_a, "head"_a,
           "embedding"_a, "heads"_a, "kv_heads"_a, "head_size"_a, "rotated"_a, "scaling"_a,
           "eps"_a, "activation"_a, "gated"_a, "parallel"_a, py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>(),
           py::keep_alive<1, 6>());
  py::class_<Decoder>(m, "Decoder")
      .def(py::init(&decoder), named, "model"_a, "rows"_a, "positions"_a, "longest_pass"_a,
           "cos"_a, "sin"_a, "instruction_set"_a = "", py::keep_alive<1, 2>(),
           py::keep_alive<1, 6>(), py::keep_alive<1, 7>())
      .def("pass_", &decoder_pass, named, "inputs"_a, "start"_a, "threads"_a)
      .def("logits", &decoder_logits, named, "out"_a, "threads"_a)
      .def("predict", &decoder_predict, named, "ids"_a, "threads"_a)
      .def("generate", &decoder_generate, named, "ids"_a, "begin"_a, "start"_a, "threads"_a);
  py::class_<DecoderBlocks>(m, "DecoderBlocks")
      .def(py::init(&decoder_blocks), named, "model"_a, py::keep_alive<1, 2>())
      .def("saved_bytes",
           [](const DecoderBlocks& self, int64_t texts, int64_t length, int64_t first,
              int64_t tile) {
             return self.saved_bytes(blocks_shape(self.model(), texts, length, first, tile));
           },
           named, "texts"_a, "length"_a, "first"_a, "tile"_a)
      .def("forward", &blocks_forward, named, "x"_a, "qkv"_a, "z"_a, "out"_a, "saved"_a, "cos"_a,
           "sin"_a, "prefix"_a, "first"_a, "tile"_a, "threads"_a)
      .def("backward", &blocks_backward, named, "x"_a, "qkv"_a, "z"_a, "grad"_a, "grad_x"_a,
           "grad_qkv"_a, "grad_z"_a, "saved"_a, "cos"_a, "sin"_a, "prefix"_a,
           "first"_a, "tile"_a, "threads"_a);
  py::class_<PreparedForward>(m, "PreparedForward")
      .def(py::init(&one_forward), "blocks"_a, "head"_a, named, "layout"_a, "cos"_a, "sin"_a,
           "prefix"_a, py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 5>(),
           py::keep_alive<1, 6>(), py::keep_alive<1, 7>())
      .def("ids", &one_forward_ids, named, "vectors"_a, "ids"_a, "tile"_a, "threads"_a);
}

}  // namespace prototok
