// How Python reaches the kernels: tensors arrive as views, every argument by its name, and each is
// checked against what the kernels will read and write. What computes does so without the GIL.
#pragma once

#include "bindings/view.h"
#include "ops/ops.h"
#include "targets/dispatch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace prototok {

// How many threads may take part: at least one.
struct Threads {
  int count = 1;
  operator int() const { return count; }
};

}  // namespace prototok

template <>
struct pybind11::detail::type_caster<prototok::Threads> {
  PYBIND11_TYPE_CASTER(prototok::Threads, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<int> number;
    if (!number.load(source, convert)) return false;
    value.count = cast_op<int>(number);
    if (value.count < 1)
      throw value_error("threads: must be at least 1, saw " + std::to_string(value.count));
    return true;
  }
};

// What kernels/prototok_kernels/views.py makes: a name, and for a tensor the tensor itself, its
// address, dtype, shape and strides.
template <>
struct pybind11::detail::type_caster<prototok::View> {
  PYBIND11_TYPE_CASTER(prototok::View, const_name("View"));
  bool load(handle source, bool) {
    PyObject* tuple = source.ptr();
    if (!PyTuple_CheckExact(tuple)) return false;
    const Py_ssize_t parts = PyTuple_GET_SIZE(tuple);
    if (parts != 1 && parts != 6) return false;
    const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); };
    value.name = PyUnicode_AsUTF8(part(0));
    if (value.name == nullptr) throw error_already_set();
    value.given = parts == 6;
    if (!value.given) return true;
    value.address = PyLong_AsVoidPtr(part(2));
    value.dtype = PyUnicode_AsUTF8(part(3));
    if (value.dtype == nullptr || !PyTuple_Check(part(4)) || !PyTuple_Check(part(5)))
      return false;
    value.rank = int(PyTuple_GET_SIZE(part(4)));
    if (value.rank > prototok::View::kDimensions || PyTuple_GET_SIZE(part(5)) != value.rank)
      throw value_error(std::string(value.name) + ": must have at most 8 dimensions, saw " +
                        std::to_string(value.rank));
    for (int i = 0; i < value.rank; ++i) {
      value.shape[std::size_t(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(part(4), i));
      value.strides[std::size_t(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(part(5), i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

namespace prototok {

namespace py = pybind11;
using std::int64_t;

// Each binds its part of the module.
void bind_ops(py::module_& m);
void bind_engines(py::module_& m);
void bind_first_layer(py::module_& m);
void bind_products(py::module_& m);

inline void require(bool met, const char* sentence) {
  if (!met) throw std::invalid_argument(sentence);
}

// Of weights by field: the one of that name.
inline View field(const py::dict& weights, const char* name) {
  if (!weights.contains(name))
    throw std::invalid_argument(std::string(name) + ": is missing among the weights");
  return weights[name].cast<View>();
}

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw std::invalid_argument("activation: '" + name + "' is unknown");
}

// cos or sin, (>= length, rotary): the width r of a table whose rows hold two halves that are alike.
inline int64_t rotary_size(const View& table, int64_t head_size) {
  const int64_t rotary = table.sizes<2>()[1];
  require(rotary % 2 == 0 && rotary <= head_size, "cos: must have an even width within a head");
  return rotary;
}

inline Head head_of(int64_t rows, const View& targets, const View& token_weight,
                       const View& loss, const View& predicted, const View& margin,
                       float temperature) {
  Head head{};
  head.rows = rows;
  head.targets = targets.data<const int64_t>({rows});
  head.token_weight = token_weight.data_or_null<const float>({rows});
  head.temperature = temperature;
  head.loss = loss.data<float>({rows});
  head.predicted = predicted.data<int64_t>({rows});
  head.margin = margin.data<float>({rows});
  return head;
}

}  // namespace prototok
