// Every operator: checked as a card would check it, then run by the CPU's kernel on aliases of the arguments.
//
// at::native::cpu_fallback is not used: it moves whatever it gets to the CPU, so mixed devices raise nothing.
#pragma once
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <map>

#include "aliases.h"
#include "runtime.h"
#include "types.h"

namespace fake_npu {

// As torch's own check: a 0-dim CPU tensor counts as a number.
inline void check_device(
    const std::string& name, const at::Tensor& tensor, std::optional<c10::Device>& common, bool host_allowed) {
  if (!tensor.defined() || tensor.is_meta()) return;
  const auto device = tensor.device();
  if (device.is_cpu() && (tensor.dim() == 0 || host_allowed)) return;
  if (!common) common = device;
  TORCH_CHECK(
      *common == device, "Expected all tensors to be on the same device, but found at least two devices, ", *common,
      " and ", device, "! (when checking arguments of ", name, ")");
}

// The first Atlas training cards have no inf in fp16: a result is cut at the largest number and a flag is set, which
// torch.npu.get_npu_overflow_flag reads (op-plugin, AmpForeachNonFiniteCheckAndUnscaleKernelNpuOpApi.cpp).
inline std::atomic<bool> overflowed{false};

inline void saturate(const at::Tensor& result) {
  if (!result.defined() || result.scalar_type() != at::kHalf || result.numel() == 0 || !result.is_cpu()) return;
  if (!at::isinf(result).any().item<bool>()) return;
  overflowed = true;
  at::AutoDispatchBelowADInplaceOrView guard;
  const_cast<at::Tensor&>(result).clamp_(-65504.0, 65504.0);
}

// op-plugin, MmKernelNpuOpApi.cpp and its kind, with GetCubeMathType and IsAllowFP32ToFP16 of Ascend/pytorch: cards before
// 910B1 multiply fp32 in fp16, which is cut at 65504 there, and sum in fp32.
inline at::Tensor in_half(const at::Tensor& host) {
  if (host.scalar_type() != at::kFloat) return host;
  at::AutoDispatchBelowADInplaceOrView guard;
  return host.clamp(-65504.0, 65504.0).to(at::kHalf).to(at::kFloat);
}

// The arguments of one boxed call, with what is done to them.
struct BoxedCall {
  BoxedCall(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op(op),
        schema(op.schema()),
        name(schema.operator_name().name),
        stack(stack),
        first(stack->size() - schema.arguments().size()) {}

  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  const std::string name;
  torch::jit::Stack* stack;
  const size_t first;
  Aliases aliases;
  std::vector<at::Generator> generators;

  c10::IValue& argument(size_t i) { return (*stack)[first + i]; }

  template <typename Function>
  static void each_tensor(const c10::IValue& value, Function&& function) {
    if (value.isTensor()) {
      function(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) function(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector())
        if (tensor) function(*tensor);
    }
  }

  void check() {
    // index tensors may stay on the host, as on cuda
    static const std::set<std::string> host_allowed = {
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
        "aten::_unsafe_index_put"};
    const bool allowed = host_allowed.count(name) > 0;
    std::optional<c10::Device> device;
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      const auto& value = argument(i);
      each_tensor(value, [&](const at::Tensor& tensor) {
        check_device(name, tensor, device, allowed);
        if (tensor.defined()) check_type(name, tensor);
      });
      if (value.isDevice() && value.toDevice().type() == kNpu && !device) device = value.toDevice();
    }
    TORCH_CHECK(
        name != "aten::ge" || !argument(1).isTensor() || argument(0).toTensor().device().type() == kNpu,
        "aten::ge with a host's number on the left asks aclnnLessScalar on npu, which is False for equal values "
        "(op-plugin, GeKernelNpuOpApi.cpp): write `tensor <= number`");
    aliases.device = device && device->has_index() ? device->index() : current;
    note_waits(op, name, &argument(0));
  }

  // op-plugin, FusedAdamWKernelNpuOpApi.cpp: grad_scale and found_inf are taken and never read; aclnnApplyAdamWV2 wants
  // one type for parameter, gradient and moments, and the first Atlas training cards do not have it.
  void as_torch_npu() {
    if (name != "aten::_fused_adamw_") return;
    TORCH_CHECK(
        !first_generation(), "aclnnApplyAdamWV2 is not supported on ", card(), " (_fused_adamw_)");
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      const auto& declared = schema.arguments()[i].name();
      if (declared == "grad_scale" || declared == "found_inf") argument(i) = c10::IValue();
    }
    for (size_t list = 1; list < 4; list++) {
      const auto parameters = argument(0).toTensorVector(), others = argument(list).toTensorVector();
      for (size_t i = 0; i < parameters.size(); i++)
        TORCH_CHECK(
            parameters[i].scalar_type() == others[i].scalar_type(),
            "aclnnApplyAdamWV2: parameter, gradient and moments must have one type, found ",
            parameters[i].scalar_type(), " and ", others[i].scalar_type());
    }
  }

  void arguments_to_host() {
    as_torch_npu();
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      auto& value = argument(i);
      const auto& declared = schema.arguments()[i];
      if (value.isTensor()) {
        value = aliases.host(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> hosts;
        for (const at::Tensor& tensor : value.toTensorVector()) hosts.push_back(aliases.host(tensor));
        value = hosts;
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> hosts;
        for (const auto& tensor : value.toOptionalTensorVector())
          hosts.push_back(tensor ? std::optional<at::Tensor>(aliases.host(*tensor)) : std::nullopt);
        value = hosts;
      } else if (value.isStorage() && value.toStorage().device_type() == kNpu) {
        value = aliases.host(value.toStorage());
      } else if (value.isDevice() && value.toDevice().type() == kNpu) {
        value = c10::Device(c10::kCPU);
      } else if (declared.type()->str() == "Generator?" || value.isGenerator()) {
        value = generator(value);
      } else if (declared.name() == "pin_memory") {
        value = c10::IValue();
      }
    }
    multiply_in_half();
  }

  void multiply_in_half() {
    static const std::map<std::string, size_t> first_factor = {
        {"aten::mm", 0}, {"aten::bmm", 0}, {"aten::addmm", 1}, {"aten::baddbmm", 1}};
    const auto found = first_factor.find(name);
    if (!first_generation() || found == first_factor.end()) return;
    for (size_t i = found->second; i < found->second + 2; i++) argument(i) = in_half(argument(i).toTensor());
  }

  at::Generator generator(const c10::IValue& value) {
    auto given = value.isNone() ? default_generator(aliases.device) : value.toGenerator();
    TORCH_CHECK(
        given.device().type() == kNpu, "Expected a 'npu' device type for generator but found '", given.device().type(),
        "' (", name, ")");
    generators.push_back(given);
    return given;
  }

  void results_to_npu() {
    aliases.write_back();
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
      auto& value = (*stack)[i];
      if (first_generation()) each_tensor(value, saturate);
      if (value.isTensor()) {
        value = aliases.npu(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> results;
        for (const at::Tensor& tensor : value.toTensorVector()) results.push_back(aliases.npu(tensor));
        value = results;
      }
    }
  }
};

// While it lives, CPU kernels draw from the device's generators, those without a generator argument too.
class GeneratorsOnHost {
 public:
  explicit GeneratorsOnHost(BoxedCall& call) : call_(call) {
    lends_default_ = call.generators.empty() && call.op.hasTag(at::Tag::nondeterministic_seeded);
    for (auto& generator : call.generators) generator.get<Generator>()->pose_as(c10::kCPU);
    if (!lends_default_) return;
    auto host = at::detail::getDefaultCPUGenerator();
    auto npu = default_generator(call.aliases.device);
    saved_ = host.get_state();
    npu.get<Generator>()->pose_as(c10::kCPU);
    host.set_state(npu.get_state());
  }
  ~GeneratorsOnHost() {
    const c10::Device device(kNpu, call_.aliases.device);
    for (auto& generator : call_.generators) generator.get<Generator>()->pose_as(device);
    if (!lends_default_) return;
    auto host = at::detail::getDefaultCPUGenerator();
    auto npu = default_generator(call_.aliases.device);
    npu.set_state(host.get_state());
    npu.get<Generator>()->pose_as(device);
    host.set_state(saved_);
  }

 private:
  BoxedCall& call_;
  bool lends_default_;
  at::Tensor saved_;
};

inline void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  operators_run++;
  BoxedCall call(op, stack);
  call.check();
  call.arguments_to_host();
  {
    GeneratorsOnHost generators(call);
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.results_to_npu();
}

inline at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  operators_run++;
  note_copy(from, to, non_blocking);
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView below;
  aliases.host(to).copy_(aliases.host(from));
  return to;
}

// torch_npu's gelu computes the tanh form whatever `approximate` says; the erf form is npu_gelu. Source: note on the
// page of torch_npu.npu_gelu, and GeluKernelNpuOpApi.cpp of op-plugin.
inline at::Tensor gelu(const at::Tensor& x, c10::string_view) {
  operators_run++;
  check_type("aten::gelu", x);
  Aliases aliases;
  aliases.device = x.device().index();
  at::AutoDispatchBelowADInplaceOrView below;
  return aliases.npu(at::gelu(aliases.host(x), "tanh"));
}

inline at::Tensor gelu_backward(const at::Tensor& gradient, const at::Tensor& x, c10::string_view) {
  operators_run++;
  check_type("aten::gelu_backward", x);
  std::optional<c10::Device> device;
  for (const auto& tensor : {gradient, x}) check_device("gelu_backward", tensor, device, false);
  Aliases aliases;
  aliases.device = x.device().index();
  at::AutoDispatchBelowADInplaceOrView below;
  return aliases.npu(at::gelu_backward(aliases.host(gradient), aliases.host(x), "tanh"));
}

// op-plugin, ConvolutionKernelNpuOpApi.cpp and ConvolutionBackward...: fp32 is multiplied in HF32 (11 bits of mantissa,
// the hidden one included) unless torch.npu.conv.allow_hf32 is False. Matrix products are not (ALLOW_MATMUL_HF32). Cards
// before 910B1 have no HF32 and multiply in fp16.
inline std::atomic<bool> conv_hf32{true};

inline at::Tensor as_multiplied(const at::Tensor& host) {
  if (first_generation()) return in_half(host);
  if (!conv_hf32 || host.scalar_type() != at::kFloat) return host;
  const auto bits = host.contiguous().view(at::kInt);
  return at::bitwise_and(bits + 0x800, ~0xFFF).view(at::kFloat);
}

// aclnnSort is told that the order of equal values does not matter (op-plugin, SortKernelNpuOpApi.cpp): here the last
// comes first, where a CPU keeps the first first.
inline std::tuple<at::Tensor, at::Tensor> sort(
    const at::Tensor& x, std::optional<bool> stable, int64_t dim, bool descending) {
  operators_run++;
  check_type("aten::sort", x);
  Aliases aliases;
  aliases.device = x.device().index();
  at::AutoDispatchBelowADInplaceOrView below;
  const auto host = aliases.host(x);
  if (stable.value_or(false) || host.dim() == 0) {
    auto [values, order] = at::sort(host, true, dim, descending);
    return {aliases.npu(values), aliases.npu(order)};
  }
  auto [values, order] = at::sort(host.flip({dim}), true, dim, descending);
  return {aliases.npu(values), aliases.npu(host.size(dim) - 1 - order)};
}

// Core torch sends an accelerator's convolutions to these two, which have no CPU kernel.
inline at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  operators_run++;
  std::optional<c10::Device> device;
  for (const auto& tensor : {x, weight, bias.value_or(at::Tensor())}) check_device("convolution", tensor, device, false);
  check_type("aten::convolution_overrideable", x);
  Aliases aliases;
  aliases.device = x.device().index();
  at::AutoDispatchBelowADInplaceOrView below;
  const auto host_bias = bias ? std::optional<at::Tensor>(aliases.host(*bias)) : std::nullopt;
  return aliases.npu(at::convolution(
      as_multiplied(aliases.host(x)), as_multiplied(aliases.host(weight)), host_bias, stride, padding, dilation, transposed, output_padding, groups));
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  operators_run++;
  std::optional<c10::Device> device;
  for (const auto& tensor : {gradient, x, weight}) check_device("convolution_backward", tensor, device, false);
  Aliases aliases;
  aliases.device = x.device().index();
  const int64_t bias_size = transposed ? weight.size(1) * groups : weight.size(0);
  at::AutoDispatchBelowADInplaceOrView below;
  const auto [dx, dweight, dbias] = at::convolution_backward(
      as_multiplied(aliases.host(gradient)), as_multiplied(aliases.host(x)), as_multiplied(aliases.host(weight)),
      wanted[2] ? at::OptionalIntArrayRef(bias_size) : std::nullopt, stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  return {aliases.npu(dx), aliases.npu(dweight), aliases.npu(dbias)};
}

// Lets `parameter.data = tensor_on_npu` work, as torch_npu does.
inline bool can_take_over(const at::Tensor& a, const at::Tensor& b) {
  return a.device().type() == b.device().type() || a.is_cpu() || b.is_cpu();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // Core torch would take these apart for a device without a kernel of its own; torch_npu has one.
  for (const char* name : {"native_layer_norm", "native_layer_norm_backward", "mse_loss", "smooth_l1_loss"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("_copy_from", copy_from);
  m.impl("sort.stable", sort);
  m.impl("gelu", gelu);
  m.impl("gelu_backward", gelu_backward);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_has_compatible_shallow_copy_type", can_take_over);
  m.impl("record_stream", +[](at::Tensor&, at::Stream) {});
}

// Autocast by torch's own lists for accelerators; torch_npu has copied them (AutoCastOps.cpp).
using namespace at;  // NOLINT: torch's macros name its types without a namespace
#define FAKE_NPU_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FAKE_NPU_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FAKE_NPU_FP32_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define FAKE_NPU_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(FAKE_NPU_LOWER)
  AT_FORALL_FP32(FAKE_NPU_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FAKE_NPU_FP32_DTYPE)
  AT_FORALL_PROMOTE(FAKE_NPU_PROMOTE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
}

}  // namespace fake_npu
