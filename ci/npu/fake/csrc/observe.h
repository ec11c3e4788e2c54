// Notes what is free on a CPU but costs time, or fails, on a card. Python (watch.py) says where in the code it was.
//
//   host_wait         the host waits until the device has done everything queued: reading a value, blocking copies in
//                     either direction (torch_npu's copy synchronises the stream unless it is non-blocking, and a
//                     non-blocking one is asynchronous only with pinned memory)
//   dynamic_shape     the result's shape depends on values: the host waits, and every new shape may be compiled anew
//   float64           a computation in double precision, which the card's cores do not have
//   undocumented_type an element type that torch_npu's API list does not have for this operator (types.h)
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "device.h"

namespace fake_npu {

inline PyObject* observer = nullptr;  // Python function (kind, operator)
inline std::atomic<int64_t> operators_run{0};

inline void note(const char* kind, const std::string& op) {
  if (!observer) return;
  py::gil_scoped_acquire gil;
  py::reinterpret_borrow<py::function>(observer)(kind, op);
}

inline bool is_boolean(const std::optional<at::Tensor>& index) {
  return index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
}

// Called with the arguments still on the device.
inline void note_waits(const c10::OperatorHandle& op, const std::string& name, const c10::IValue* arguments) {
  if (op.hasTag(at::Tag::data_dependent_output)) note("host_wait", name);
  const bool indexes = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
  if (indexes) {
    // op-plugin, IndexPutKernelNpuOpApi.cpp: a mask and one value become masked_fill with value.item()
    const bool puts_one = name != "aten::index" && name != "aten::_unsafe_index" && arguments[2].toTensor().numel() == 1 &&
        !(name == "aten::_index_put_impl_" && arguments[3].toBool());
    for (const auto& index : arguments[1].toOptionalTensorVector()) {
      if (is_boolean(index) && puts_one) {
        if (!arguments[2].toTensor().is_cpu()) note("host_wait", name + " (one value of the device under a mask)");
      } else if (is_boolean(index)) note("dynamic_shape", name + " (boolean)");
      else if (index && index->defined() && index->is_cpu()) note("host_wait", name + " (index on the host)");
    }
  } else if (op.hasTag(at::Tag::dynamic_output_shape)) {
    note("dynamic_shape", name);
  }
}

inline void note_copy(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.device().type() == to.device().type() || from.numel() == 0) return;
  const auto& host = from.is_cpu() ? from : to;
  if (non_blocking && is_pinned(host.storage().data())) return;
  note("host_wait", from.is_cpu() ? "copy host to device" : "copy device to host");
}

}  // namespace fake_npu
