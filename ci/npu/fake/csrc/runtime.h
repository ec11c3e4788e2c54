// What torch asks of an accelerator's runtime: device guard, streams and events (all work is done at once), random
// generators, and the hooks by which core torch finds them.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

#include "device.h"

namespace fake_npu {

inline thread_local c10::StreamId current_stream[kMaxDevices] = {};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return kNpu; }
  Device exchangeDevice(Device device) const override {
    const auto before = current;
    set_current(device.index());
    return Device(kNpu, before);
  }
  Device getDevice() const override { return Device(kNpu, current); }
  void setDevice(Device device) const override { set_current(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }

  static Stream stream(Device device, c10::StreamId id) {
    return Stream(Stream::UNSAFE, Device(kNpu, device.has_index() ? device.index() : current), id);
  }
  Stream getStream(Device device) const override {
    const auto index = device.has_index() ? device.index() : current;
    return stream(Device(kNpu, index), current_stream[index]);
  }
  Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream getNewStream(Device device, int) const override {
    static std::atomic<int> count{0};
    return stream(device, 1 + count++ % 32);
  }
  Stream exchangeStream(Stream next) const override {
    const auto before = getStream(next.device());
    current_stream[next.device_index()] = next.id();
    return before;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  // An event is the time, in milliseconds, at which it was recorded.
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new double;
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    *static_cast<double*>(*event) = std::chrono::duration<double, std::milli>(now).count();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    return *static_cast<double*>(end) - *static_cast<double*>(begin);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// CPU kernels draw the numbers, so an npu generator is a CPU generator that says "npu" except while such a kernel runs.
struct Generator : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index, uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    pose_as(c10::Device(kNpu, index));
  }
  void pose_as(c10::Device device) {
    device_ = device;
    key_set_ = c10::DispatchKeySet(device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1);
  }
};

inline const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMaxDevices; i++) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all[index < 0 ? current : index];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto before = current;
    set_current(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(kNpu, current); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = host_storage(bytes);
    std::memcpy(fresh.mutable_data(), storage.data(), std::min(bytes, storage.nbytes()));
    auto& changed = const_cast<c10::Storage&>(storage);
    changed.set_data_ptr_noswap(npu_pointer(fresh, storage.device().index()));
    changed.set_nbytes(bytes);
  }
};

}  // namespace fake_npu
