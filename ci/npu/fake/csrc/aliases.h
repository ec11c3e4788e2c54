// Host tensors over the bytes of npu tensors, and back: nothing is copied, and views stay views.
#pragma once
#include "device.h"

namespace fake_npu {

// The aliases of one operator call.
class Aliases {
 public:
  c10::DeviceIndex device = 0;  // of results

  c10::Storage host(const c10::Storage& npu) {
    for (const auto& pair : storages_)
      if (pair.npu.unsafeGetStorageImpl() == npu.unsafeGetStorageImpl()) return pair.host;
    auto* keep = new c10::Storage(npu);
    void* data = const_cast<void*>(npu.data());
    c10::DataPtr pointer(data, keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, c10::kCPU);
    c10::Storage alias(
        c10::Storage::use_byte_size_t(), npu.nbytes(), std::move(pointer), c10::GetCPUAllocator(), true);
    storages_.push_back({npu, alias, data});
    return alias;
  }

  at::Tensor host(const at::Tensor& npu) {
    if (!npu.defined() || npu.device().type() != kNpu) return npu;
    for (const auto& [known, alias] : tensors_)
      if (known.is_same(npu)) return alias;
    auto alias = tensor_over(host(npu.storage()), npu, c10::DispatchKey::CPU);
    if (npu.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors_.emplace_back(npu, alias);
    return alias;
  }

  at::Tensor npu(const at::Tensor& host) {
    if (!host.defined() || !host.is_cpu()) return host;
    for (const auto& [known, alias] : tensors_)
      if (alias.is_same(host)) return known;
    return tensor_over(npu(host.storage()), host, c10::DispatchKey::PrivateUse1);
  }

  // Carries resize_, set_ and in-place changes of shape from the aliases over to the npu tensors.
  void write_back() {
    for (size_t i = 0; i < storages_.size(); i++) {
      auto pair = storages_[i];
      if (pair.host.data() == pair.data && pair.host.nbytes() == pair.npu.nbytes()) continue;
      auto bytes = pair.host.nbytes();
      c10::Storage moved(
          c10::Storage::use_byte_size_t(), bytes, pair.host.set_data_ptr(c10::DataPtr()), c10::GetCPUAllocator(), true);
      pair.npu.set_data_ptr_noswap(npu_pointer(moved, device));
      pair.npu.set_nbytes(bytes);
    }
    for (size_t i = 0; i < tensors_.size(); i++) {
      auto [npu_tensor, alias] = tensors_[i];
      auto* impl = npu_tensor.unsafeGetTensorImpl();
      auto storage = npu(alias.storage());
      if (storage.unsafeGetStorageImpl() != npu_tensor.storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(storage);
      if (npu_tensor.sizes() != alias.sizes() || npu_tensor.strides() != alias.strides() ||
          npu_tensor.storage_offset() != alias.storage_offset())
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

 private:
  struct Pair {
    c10::Storage npu, host;
    const void* data;
  };

  c10::Storage npu(const c10::Storage& host) {
    for (const auto& pair : storages_)
      if (pair.host.unsafeGetStorageImpl() == host.unsafeGetStorageImpl()) return pair.npu;
    c10::Storage made(
        c10::Storage::use_byte_size_t(), host.nbytes(), npu_pointer(host, device), &npu_allocator, true);
    storages_.push_back({made, host, host.data()});
    return made;
  }

  static at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_neg()) made._set_neg(true);
    if (like.is_conj()) made._set_conj(true);
    return made;
  }

  std::vector<Pair> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // (npu, host alias)
};

}  // namespace fake_npu
