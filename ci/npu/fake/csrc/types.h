// Element types that operators take, where they are fewer than the CPU's: bf16, fp16 and fp32 only.
//
// Source: torch_npu's API list (Ascend/pytorch, docs/zh/native_apis/pytorch_2-10-0/{torch,torch-nn-functional}.md),
// rows of the functions that reach these operators. Where two rows disagree (torch.mm lists fp16 and fp32,
// functional.linear also bf16) the union is taken.
#pragma once
#include <cstdlib>
#include <regex>
#include <set>
#include <string>

#include "observe.h"

namespace fake_npu {

// Which card is simulated: FAKE_NPU_CARD, "Ascend910B3" (Atlas A2) by default. The first Atlas training cards
// ("Ascend910A", "Ascend910ProB") have no bf16 and no aclnnApplyAdamWV2 (CANN, ops-nn, optim/apply_adam_w_v2/docs).
inline std::string card() {
  const char* given = std::getenv("FAKE_NPU_CARD");
  return given ? given : "Ascend910B3";
}

inline bool first_generation() {
  static const bool first = !std::regex_search(card(), std::regex("^Ascend(910B[0-9]|910_[0-9]|9[5-9][0-9])"));
  return first;
}

inline bool refuses_float64(const std::string& name) {
  static const std::set<std::string> refusing = {
      "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::convolution_overrideable",  //
      "aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::gelu", "aten::gelu_backward",
      "aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::nll_loss_forward", "aten::nll_loss_backward",
      "aten::mse_loss", "aten::smooth_l1_loss", "aten::embedding", "aten::index_add", "aten::index_add_",
      "aten::index_copy", "aten::index_copy_", "aten::index_select", "aten::gather", "aten::cumsum", "aten::flip",
      "aten::binary_cross_entropy_with_logits"};
  return refusing.count(name) > 0;
}

// Half precisions: rows without bf16.
inline bool lists_no_bfloat16(const std::string& name) {
  static const std::set<std::string> without = {
      "aten::nll_loss_forward", "aten::mse_loss", "aten::index_add", "aten::index_add_", "aten::index_copy",
      "aten::index_copy_", "aten::gather", "aten::cumsum", "aten::flip"};
  return without.count(name) > 0;
}

inline void check_type(const std::string& name, const at::Tensor& tensor) {
  if (tensor.device().type() != kNpu) return;
  if (tensor.scalar_type() == at::kDouble) {
    TORCH_CHECK(
        !refuses_float64(name),
        name, ": float64 is not supported on npu (torch_npu's API list has bf16, fp16 and fp32 for it)");
    note("float64", name);
  } else if (tensor.scalar_type() == at::kBFloat16 && first_generation()) {
    TORCH_CHECK(false, name, ": ", card(), " has no bfloat16");
  } else if (tensor.scalar_type() == at::kBFloat16 && lists_no_bfloat16(name)) {
    note("undocumented_type", name + " bfloat16");
  }
}

}  // namespace fake_npu
