// The devices themselves: how many, which is current, and their memory, which is host memory counted per device.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>

namespace fake_npu {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;
constexpr size_t kTotalBytes = size_t{64} << 30;  // of an Ascend 910B

inline int device_count() {
  static const int count = [] {
    const char* text = std::getenv("FAKE_NPU_DEVICES");
    return text ? std::min(std::atoi(text), kMaxDevices) : 2;
  }();
  return count;
}

inline thread_local c10::DeviceIndex current = 0;
inline std::atomic<bool> used{false};
inline std::atomic<bool> in_bad_fork{false};

inline void set_current(c10::DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < device_count(), "npu: invalid device ordinal ", int(index), ", there are ", device_count());
  current = index;
}

// A card's context does not survive fork(): a loader worker that touches the device must fail here as it would there.
inline void check_fork() {
  if (!used.exchange(true)) pthread_atfork(nullptr, nullptr, [] { in_bad_fork = true; });
  TORCH_CHECK(
      !in_bad_fork,
      "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the 'spawn' start method");
}

struct Memory {
  std::atomic<int64_t> bytes{0}, peak{0}, ever{0};
};
inline Memory memory[kMaxDevices];

// What an npu DataPtr owns: the CPU storage that holds its bytes.
struct Owned {
  c10::Storage host;
  c10::DeviceIndex device;
  int64_t bytes;
};

// An npu pointer to the same bytes as `host`, counted on `device` until it is freed.
inline c10::DataPtr npu_pointer(c10::Storage host, c10::DeviceIndex device) {
  check_fork();
  auto& count = memory[device];
  const auto bytes = static_cast<int64_t>(host.nbytes());
  const auto now = count.bytes += bytes;
  count.ever += bytes;
  for (auto peak = count.peak.load(); now > peak && !count.peak.compare_exchange_weak(peak, now);) {
  }
  void* data = host.mutable_data();
  return {
      data,
      new Owned{std::move(host), device, bytes},
      [](void* context) {
        auto* owned = static_cast<Owned*>(context);
        memory[owned->device].bytes -= owned->bytes;
        delete owned;
      },
      c10::Device(kNpu, device)};
}

inline c10::Storage host_storage(size_t bytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true);
}

struct NpuAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    return npu_pointer(host_storage(bytes), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats{};
    const auto& count = memory[device];
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*kind)[0].current = count.bytes;
      (*kind)[0].peak = count.peak;
      (*kind)[0].allocated = count.ever;
      (*kind)[0].freed = count.ever - count.bytes;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override { memory[device].ever = memory[device].bytes.load(); }
  void resetPeakStats(c10::DeviceIndex device) override { memory[device].peak = memory[device].bytes.load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {kTotalBytes - memory[device].bytes, kTotalBytes};
  }
};
inline NpuAllocator npu_allocator;
REGISTER_ALLOCATOR(kNpu, &npu_allocator);

// Pinned host memory is plain memory whose addresses are remembered.
inline std::mutex pinned_mutex;
inline std::set<const void*> pinned;

inline bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  return pinned.count(data) > 0;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(data);
    return {data, data, &release, c10::kCPU};
  }
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(data);
    }
    std::free(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
inline PinnedAllocator pinned_allocator;

}  // namespace fake_npu
