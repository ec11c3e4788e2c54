// "hccl": a process group that gives aliases of npu tensors to gloo and waits for it.
//
// As HCCL it takes npu tensors only, contiguous, and reduces no float64.
#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "aliases.h"

namespace fake_npu {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

struct FinishedWork final : c10d::Work {
  explicit FinishedWork(Tensors results) : results_(std::move(results)) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{});
    future_->markCompleted(c10::IValue(results_));
    finish();
  }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return results_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  Tensors results_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

class Hccl final : public c10d::Backend {
 public:
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "hccl"; }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto hosts = host(tensors);
    return finished(gloo_->broadcast(hosts, options), tensors);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto hosts = host(tensors);
    for (const auto& tensor : tensors) {
      const auto type = tensor.scalar_type();
      TORCH_CHECK(
          type != at::kDouble && type != at::kBool && type != at::kByte,
          "hccl: allreduce does not support ", type, " (HcclAllReduce: int8 to int64, fp16, fp32, bf16)");
    }
    auto sums = options;
    const bool averages = options.reduceOp == c10d::ReduceOp::AVG;  // which gloo does not have
    if (averages) sums.reduceOp = c10d::ReduceOp::SUM;
    auto work = finished(gloo_->allreduce(hosts, sums), tensors);
    if (averages)
      for (auto& tensor : hosts) tensor.div_(getSize());
    return work;
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    for (auto& tensor : tensors) {
      Tensors one{tensor};
      allreduce(one, options);
    }
    return done(tensors);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto hosts = host(tensors);
    return finished(gloo_->reduce(hosts, options), tensors);
  }
  WorkPtr allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto host_out = host(out);
    auto host_in = host(in);
    return finished(gloo_->allgather(host_out, host_in, options), flat(out));
  }
  WorkPtr _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& options) override {
    auto host_out = host(Tensors{out}), host_in = host(Tensors{in});
    return finished(gloo_->_allgather_base(host_out[0], host_in[0], options), {out});
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < out.size(); i++) _allgather_base(out[i], in[i], options);
    return done(out);
  }
  WorkPtr gather(std::vector<Tensors>& out, Tensors& in, const c10d::GatherOptions& options) override {
    auto host_out = host(out);
    auto host_in = host(in);
    return finished(gloo_->gather(host_out, host_in, options), flat(out));
  }
  WorkPtr scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ScatterOptions& options) override {
    auto host_out = host(out);
    auto host_in = host(in);
    return finished(gloo_->scatter(host_out, host_in, options), out);
  }
  // gloo has no reduce-scatter for every type: everything is summed, and each rank keeps its share.
  WorkPtr reduce_scatter(
      Tensors& out, std::vector<Tensors>& in, const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < out.size(); i++) {
      auto all = at::stack(in[i], 0);
      _reduce_scatter_base(out[i], all, options);
    }
    return done(out);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& options) override {
    Tensors sum{in.clone()};
    c10d::AllreduceOptions reduction;
    reduction.reduceOp = options.reduceOp;
    allreduce(sum, reduction);
    out.copy_(sum[0].reshape({getSize(), -1})[getRank()].view(out.sizes()));
    return done({out});
  }
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < out.size(); i++) _reduce_scatter_base(out[i], in[i], options);
    return done(out);
  }
  WorkPtr alltoall_base(
      at::Tensor& out, at::Tensor& in, std::vector<int64_t>& out_sizes, std::vector<int64_t>& in_sizes,
      const c10d::AllToAllOptions& options) override {
    auto host_out = host(Tensors{out}), host_in = host(Tensors{in});
    return finished(gloo_->alltoall_base(host_out[0], host_in[0], out_sizes, in_sizes, options), {out});
  }
  WorkPtr send(Tensors& tensors, int rank, int tag) override {
    auto hosts = host(tensors);
    return finished(gloo_->send(hosts, rank, tag), tensors);
  }
  WorkPtr recv(Tensors& tensors, int rank, int tag) override {
    auto hosts = host(tensors);
    return finished(gloo_->recv(hosts, rank, tag), tensors);
  }
  WorkPtr barrier(const c10d::BarrierOptions&) override { return finished(gloo_->barrier(c10d::BarrierOptions()), {}); }

 private:
  static Tensors host(const Tensors& tensors) {
    Aliases aliases;
    Tensors hosts;
    for (const auto& tensor : tensors) {
      TORCH_CHECK(tensor.device().type() == kNpu, "hccl: expected npu tensors, got ", tensor.device());
      TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "hccl: tensors must be contiguous");
      hosts.push_back(aliases.host(tensor));
    }
    return hosts;
  }
  static std::vector<Tensors> host(const std::vector<Tensors>& lists) {
    std::vector<Tensors> hosts;
    for (const auto& tensors : lists) hosts.push_back(host(tensors));
    return hosts;
  }
  static Tensors flat(const std::vector<Tensors>& lists) {
    Tensors all;
    for (const auto& tensors : lists) all.insert(all.end(), tensors.begin(), tensors.end());
    return all;
  }
  static WorkPtr done(Tensors results) { return c10::make_intrusive<FinishedWork>(std::move(results)); }
  static WorkPtr finished(const WorkPtr& work, Tensors results) {
    work->wait();
    return done(std::move(results));
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace fake_npu
