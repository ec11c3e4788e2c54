// An "npu" device for tests, in host memory: torch's PrivateUse1 device type with the CPU's kernels behind it.
// One translation unit: most of the build time is torch's headers.
#include "hccl.h"
#include "operators.h"

namespace {

void observe(const py::object& function) {
  Py_XDECREF(fake_npu::observer);
  fake_npu::observer = function.is_none() ? nullptr : function.inc_ref().ptr();
}

int exchange_device(int index) {
  const int before = fake_npu::current;
  if (index >= 0) fake_npu::set_current(index);
  return before;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static fake_npu::Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("device_count", &fake_npu::device_count);
  m.def("current_device", [] { return int(fake_npu::current); });
  m.def("set_device", [](int index) { fake_npu::set_current(index); });
  m.def("exchange_device", &exchange_device, "makes a device current (none if negative) and returns the one before");
  m.def("default_generator", [](int index) { return fake_npu::default_generator(index); });
  m.def("allocated_bytes", [](int index) { return fake_npu::memory[index].bytes.load(); });
  m.def("peak_bytes", [](int index) { return fake_npu::memory[index].peak.load(); });
  m.def("reset_peak", [](int index) { fake_npu::npu_allocator.resetPeakStats(index); });
  m.def("total_bytes", [] { return fake_npu::kTotalBytes; });
  m.def("card", &fake_npu::card);
  m.def("overflow_flag", [] { return fake_npu::overflowed.load(); });
  m.def("clear_overflow_flag", [] { fake_npu::overflowed = false; });
  m.def("conv_hf32", [] { return fake_npu::conv_hf32.load(); });
  m.def("allow_conv_hf32", [](bool allowed) { fake_npu::conv_hf32 = allowed; });
  m.def("first_generation", &fake_npu::first_generation);
  m.def("in_bad_fork", [] { return fake_npu::in_bad_fork.load(); });
  m.def("observe", &observe, "calls function(kind, operator) for what observe.h lists; None stops it");
  m.def("note", [](const std::string& kind, const std::string& op) { fake_npu::note(kind.c_str(), op); });
  m.def("operators_run", [] { return fake_npu::operators_run.load(); });
  m.def("hccl", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<fake_npu::Hccl>(std::move(gloo));
  });
}
