#include "simccl.h"

#include <map>
#include <sstream>

#include "allocator.h"
#include "operators.h"

namespace sim {

namespace {
using at::Tensor;
using c10d::OpType;
using Tensors = std::vector<Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

constexpr int64_t kHeaderBytes = 320;

std::string sizes_of(const Tensors& tensors) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < tensors.size(); ++i) text << (i ? ", " : "") << tensors[i].sizes();
  text << "]";
  if (!tensors.empty()) text << " " << tensors[0].dtype();
  return text.str();
}

Tensor reduced(const Tensors& by_rank, const c10d::ReduceOp& op) {
  Tensor total = by_rank[0].clone();
  for (size_t r = 1; r < by_rank.size(); ++r) {
    switch (op.op_) {
      case c10d::ReduceOp::SUM:
      case c10d::ReduceOp::AVG: total.add_(by_rank[r]); break;
      case c10d::ReduceOp::PRODUCT: total.mul_(by_rank[r]); break;
      case c10d::ReduceOp::MIN: total.copy_(at::minimum(total, by_rank[r])); break;
      case c10d::ReduceOp::MAX: total.copy_(at::maximum(total, by_rank[r])); break;
      default: TORCH_CHECK(false, "simccl does not reduce so");
    }
  }
  return op.op_ == c10d::ReduceOp::AVG ? total.div_(static_cast<int64_t>(by_rank.size())) : total;
}

// One call of the script, with what it reads and writes as the device sees it.
struct Operation {
  OpType kind;
  std::string text;  // equal on all ranks
  Tensors reads, writes;
  // Starts, and returns what to wait for.
  std::function<WorkPtr(Tensors reads, Tensors writes)> start;
  int peer = -1;  // of a point-to-point operation
};

class SimWork final : public c10d::Work {
 public:
  SimWork(int rank, OpType kind, Point end, Tensors held, Tensors results, bool host_waits)
      : Work(rank, kind), end_(std::move(end)), held_(std::move(held)), results_(std::move(results)),
        host_waits_(host_waits) {}

  // Nobody ordered anything after it, so its memory may only serve again once it has ended.
  ~SimWork() override {
    for (const Tensor& tensor : held_)
      device_allocator()->recordStream(tensor.storage().data_ptr(), as_stream(end_.stream));
  }

  bool wait(std::chrono::milliseconds = kNoTimeout) override {
    if (host_waits_)
      Runtime::get().wait(end_);
    else
      Runtime::get().block(current_streams[end_.stream % kDevices], end_);
    held_.clear();
    return true;
  }
  void synchronize() override { wait(); }
  bool isCompleted() override { return Runtime::get().query(end_); }
  bool isSuccess() const override { return true; }  // an error is the device's, as it is with NCCL by default
  Tensors result() override { return results_; }

 private:
  Point end_;
  Tensors held_, results_;
  bool host_waits_;
};

class SimCCL final : public c10d::Backend {
 public:
  SimCCL(c10::intrusive_ptr<c10d::Backend> transport, int rank, int size, std::vector<int64_t> members)
      : Backend(rank, size), transport_(std::move(transport)), members_(std::move(members)) {}

  ~SimCCL() override {
    for (int stream : streams_)
      if (stream >= 0) Runtime::get().retire_communicator_stream(stream);
  }

  const std::string getBackendName() const override { return "simccl"; }
  bool supportsCoalescing() const override { return true; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return calls_; }

  void startCoalescing() override { coalescing_ = true; }
  WorkPtr endCoalescing() override {
    coalescing_ = false;
    std::vector<Operation> together = std::move(coalesced_);
    coalesced_.clear();
    return together.empty() ? WorkPtr() : launch(std::move(together));
  }

  // --- collectives ----------------------------------------------------------------------------------------------------
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    return issue(all_reduce_of(tensors.at(0), opts.reduceOp));
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override {
    std::vector<Operation> together;
    for (const Tensor& tensor : tensors) together.push_back(all_reduce_of(tensor, opts.reduceOp));
    return issue(std::move(together));
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override {
    const int root = static_cast<int>(opts.rootRank);
    const bool sends = root == getRank();
    Operation op{OpType::BROADCAST, "broadcast from " + std::to_string(root) + " of " + sizes_of(tensors)};
    (sends ? op.reads : op.writes) = tensors;
    op.start = [this, root, sends](Tensors reads, Tensors writes) {
      c10d::BroadcastOptions options;
      options.rootRank = root;
      return transport_->broadcast(sends ? reads : writes, options);
    };
    return issue(std::move(op));
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override {
    Operation op{OpType::REDUCE, "reduce to " + std::to_string(opts.rootRank) + " of " + sizes_of(tensors), tensors};
    const bool is_root = opts.rootRank == getRank();
    if (is_root) op.writes = tensors;
    op.start = [this, is_root, how = opts.reduceOp](Tensors reads, Tensors writes) {
      const Tensor total = reduced(from_all(reads[0]), how);
      if (is_root) writes[0].copy_(total);
      return WorkPtr();
    };
    return issue(std::move(op));
  }

  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions&) override {
    Operation op{OpType::ALLGATHER, "all_gather of " + sizes_of(inputs), inputs, outputs.at(0)};
    op.start = [this](Tensors reads, Tensors writes) {
      const Tensors all = from_all(reads[0]);
      for (size_t r = 0; r < all.size(); ++r) writes[r].copy_(all[r].view_as(writes[r]));
      return WorkPtr();
    };
    return issue(std::move(op));
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions&) override {
    return issue(all_gather_of(output, input));
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions&) override {
    std::vector<Operation> together;
    for (size_t i = 0; i < inputs.size(); ++i) together.push_back(all_gather_of(outputs[i], inputs[i]));
    return issue(std::move(together));
  }

  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& opts) override {
    Operation op{OpType::REDUCE_SCATTER, "reduce_scatter of " + sizes_of(inputs.at(0)), inputs[0], {outputs.at(0)}};
    op.start = [this, how = opts.reduceOp](Tensors reads, Tensors writes) {
      for (int r = 0; r < getSize(); ++r) {
        const Tensor total = reduced(from_all(reads[r]), how);
        if (r == getRank()) writes[0].copy_(total.view_as(writes[0]));
      }
      return WorkPtr();
    };
    return issue(std::move(op));
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& opts) override {
    return issue(reduce_scatter_of(output, input, opts.reduceOp));
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& opts) override {
    std::vector<Operation> together;
    for (size_t i = 0; i < inputs.size(); ++i)
      together.push_back(reduce_scatter_of(outputs[i], inputs[i], opts.reduceOp));
    return issue(std::move(together));
  }

  WorkPtr alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& to_take, std::vector<int64_t>& to_give,
                        const c10d::AllToAllOptions&) override {
    Operation op{OpType::ALLTOALL_BASE, "all_to_all of " + std::string(input.dtype().name()), {input}, {output}};
    op.start = [this, to_take, to_give](Tensors reads, Tensors writes) mutable {
      return transport_->alltoall_base(writes[0], reads[0], to_take, to_give);
    };
    return issue(std::move(op));
  }

  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override {
    const int root = static_cast<int>(opts.rootRank);
    Operation op{OpType::GATHER, "gather to " + std::to_string(root) + " of " + sizes_of(inputs), inputs};
    if (root == getRank()) op.writes = outputs.at(0);
    op.start = [this](Tensors reads, Tensors writes) {
      const Tensors all = from_all(reads[0]);
      for (size_t r = 0; r < writes.size(); ++r) writes[r].copy_(all[r]);
      return WorkPtr();
    };
    return issue(std::move(op));
  }

  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override {
    const int root = static_cast<int>(opts.rootRank);
    Operation op{OpType::SCATTER, "scatter from " + std::to_string(root) + " of " + sizes_of(outputs)};
    if (root == getRank()) op.reads = inputs.at(0);
    op.writes = outputs;
    op.start = [this, root](Tensors reads, Tensors writes) {
      c10d::ScatterOptions options;
      options.rootRank = root;
      std::vector<Tensors> given;
      if (root == getRank()) given.push_back(std::move(reads));
      return transport_->scatter(writes, given, options);
    };
    return issue(std::move(op));
  }

  WorkPtr barrier(const c10d::BarrierOptions& opts) override {
    Operation op{OpType::BARRIER, "barrier"};
    op.start = [](Tensors, Tensors) { return WorkPtr(); };
    std::vector<Operation> alone;
    alone.push_back(std::move(op));
    return launch(std::move(alone), opts.device_ids.empty() ? current_device : int(opts.device_ids[0]));
  }

  // --- between two ranks -------------------------------------------------------------------------------------------------
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    Operation op{OpType::SEND, "send from " + std::to_string(getRank()) + " to " + std::to_string(to) + " of " +
                                   sizes_of(tensors), tensors};
    op.peer = to;
    op.start = [this, to, tag, text = op.text](Tensors reads, Tensors) {
      Tensors header{header_of(text)};
      transport_->send(header, to, tag)->wait();
      return transport_->send(reads, to, tag);
    };
    return issue(std::move(op));
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    Operation op{OpType::RECV, "send from " + std::to_string(from) + " to " + std::to_string(getRank()) + " of " +
                                   sizes_of(tensors), {}, tensors};
    op.peer = from;
    op.start = [this, from, tag, text = op.text](Tensors, Tensors writes) {
      Tensors header{at::empty({kHeaderBytes}, at::kByte)};
      transport_->recv(header, from, tag)->wait();
      TORCH_CHECK(text_of(header[0]) == text, "rank ", getRank(), " expects a '", text, "', but got a '",
                  text_of(header[0]), "'");
      return transport_->recv(writes, from, tag);
    };
    return issue(std::move(op));
  }

 private:
  Operation all_reduce_of(const Tensor& tensor, const c10d::ReduceOp& how) {
    Operation op{OpType::ALLREDUCE, "all_reduce of " + sizes_of({tensor}), {tensor}, {tensor}};
    op.start = [this, how](Tensors reads, Tensors writes) {
      writes[0].copy_(reduced(from_all(reads[0]), how));
      return WorkPtr();
    };
    return op;
  }

  Operation all_gather_of(const Tensor& output, const Tensor& input) {
    TORCH_CHECK(output.numel() == input.numel() * getSize(), "simccl: all_gather of ", input.numel(), " elements into ",
                output.numel(), " on ", getSize(), " ranks");
    Operation op{OpType::_ALLGATHER_BASE, "all_gather of " + sizes_of({input}), {input}};
    const Tensor flat = output.detach().view(-1);
    std::vector<int> sources;
    for (int r = 0; r < getSize(); ++r) {
      const Tensor part = flat.narrow(0, r * input.numel(), input.numel());
      if (part.const_data_ptr() == input.const_data_ptr()) continue;  // in place: it is there
      op.writes.push_back(part);
      sources.push_back(r);
    }
    op.start = [this, sources](Tensors reads, Tensors writes) {
      const Tensors all = from_all(reads[0]);
      for (size_t i = 0; i < writes.size(); ++i) writes[i].copy_(all[sources[i]].view_as(writes[i]));
      return WorkPtr();
    };
    return op;
  }

  Operation reduce_scatter_of(const Tensor& output, const Tensor& input, const c10d::ReduceOp& how) {
    TORCH_CHECK(input.numel() == output.numel() * getSize(), "simccl: reduce_scatter of ", input.numel(),
                " elements into ", output.numel(), " on ", getSize(), " ranks");
    Operation op{OpType::_REDUCE_SCATTER_BASE, "reduce_scatter of " + sizes_of({input}), {input}, {output}};
    op.start = [this, how](Tensors reads, Tensors writes) {
      const Tensor total = reduced(from_all(reads[0].view({getSize(), -1})), how);
      writes[0].copy_(total[getRank()].view_as(writes[0]));
      return WorkPtr();
    };
    return op;
  }

  Tensors from_all(const Tensor& mine) {
    Tensors sent{mine.contiguous()};
    std::vector<Tensors> received(1);
    for (int r = 0; r < getSize(); ++r) received[0].push_back(at::empty(mine.sizes(), mine.options()));
    transport_->allgather(received, sent)->wait();
    return received[0];
  }

  static Tensor header_of(const std::string& text) {
    Tensor header = at::zeros({kHeaderBytes}, at::kByte);
    memcpy(header.data_ptr(), text.data(), std::min<size_t>(text.size(), kHeaderBytes - 1));
    return header;
  }
  static std::string text_of(const Tensor& header) { return static_cast<const char*>(header.const_data_ptr()); }

  // Every rank says what it is about to do, and where in its order. Whoever disagrees is named.
  void agree(const std::string& text, uint64_t place) {
    const Tensors said = from_all(header_of(text));
    const Tensors places = from_all(at::full({1}, static_cast<int64_t>(place), at::kLong));
    for (int r = 0; r < getSize(); ++r) {
      TORCH_CHECK(text_of(said[r]) == text, "the ranks disagree about what comes next: rank ", getRank(), " is at '",
                  text, "', rank ", r, " at '", text_of(said[r]), "'");
      const auto other = places[r].item<int64_t>();
      TORCH_CHECK(other == static_cast<int64_t>(place), "the ranks use their communicators in different orders: '",
                  text, "' is the ", place, ". collective among these ranks on rank ", getRank(), ", the ", other,
                  ". on rank ", r);
    }
  }

  void check(const Tensors& tensors) const {
    for (const Tensor& tensor : tensors) {
      TORCH_CHECK(on_sim(tensor), "simccl: tensors must be on a device of type sim, but one is on ", tensor.device());
      TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "simccl: tensors must be contiguous");
      TORCH_CHECK(tensor.device() == tensors[0].device(), "simccl: tensors of one call are on several devices");
    }
  }

  WorkPtr issue(Operation op) {
    std::vector<Operation> alone;
    alone.push_back(std::move(op));
    return issue(std::move(alone));
  }

  WorkPtr issue(std::vector<Operation> operations) {
    for (const Operation& op : operations) {
      check(op.reads);
      check(op.writes);
    }
    if (!coalescing_) return launch(std::move(operations));
    std::move(operations.begin(), operations.end(), std::back_inserter(coalesced_));
    return {};
  }

  // All of them as one task of the communicator's stream, after what the current stream was told.
  WorkPtr launch(std::vector<Operation> operations, int device = -1) {
    std::string text;
    std::vector<Access> accesses;
    Tensors held, results;
    bool collective = false;
    std::vector<std::pair<Tensors, Tensors>> views;
    for (Operation& op : operations) {
      collective = collective || op.peer < 0;
      text += (text.empty() ? "" : " + ") + op.text;
      views.emplace_back();
      for (const Tensor& tensor : op.reads) {
        device = tensor.device().index();
        accesses.push_back(access_of(tensor, false));
        views.back().first.push_back(device_view(tensor));
        held.push_back(tensor);
      }
      for (const Tensor& tensor : op.writes) {
        device = tensor.device().index();
        accesses.push_back(access_of(tensor, true));
        views.back().second.push_back(device_view(tensor));
        held.push_back(tensor);
        results.push_back(tensor);
      }
      op.reads.clear();  // the task must not keep device memory: nothing would order its reuse
      op.writes.clear();
    }
    Runtime& runtime = Runtime::get();
    const int stream = stream_on(device);
    const OpType kind = operations[0].kind;
    runtime.block(stream, runtime.now(current_streams[device]));
    const uint64_t place = collective ? next_place() : 0;
    const std::string name = "#" + std::to_string(++calls_) + " " + text;
    auto task = [this, self = c10::intrusive_ptr<SimCCL>::reclaim_copy(this), operations = std::move(operations),
                 views = std::move(views), collective, place, name = collective ? name : text] {
      if (collective) agree(name, place);
      std::vector<std::exception_ptr> errors(operations.size());
      auto go = [&](size_t i) {
        try {
          if (WorkPtr work = operations[i].start(views[i].first, views[i].second)) work->wait();
        } catch (...) {
          errors[i] = std::current_exception();
        }
      };
      std::map<std::pair<OpType, int>, std::vector<size_t>> pairs;  // each in its order, beside each other
      for (size_t i = 0; i < operations.size(); ++i) {
        if (operations[i].peer < 0)
          go(i);
        else
          pairs[{operations[i].kind, operations[i].peer}].push_back(i);
      }
      std::vector<std::thread> threads;
      for (const auto& [pair, its] : pairs)
        threads.emplace_back([&go, &its = its] {
          for (size_t i : its) go(i);
        });
      for (std::thread& thread : threads) thread.join();
      for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
    };
    const Point end = runtime.enqueue(stream, "simccl " + name, accesses, std::move(task));
    return c10::make_intrusive<SimWork>(getRank(), kind, end, std::move(held), std::move(results),
                                        kind == OpType::BARRIER);
  }

  int stream_on(int device) {
    if (streams_[device] < 0) streams_[device] = Runtime::get().communicator_stream(device);
    return streams_[device];
  }

  // Communicators of the same ranks share the device: their collectives must come in one order on all of them.
  uint64_t next_place() {
    static std::mutex mutex;
    static auto* places = new std::map<std::vector<int64_t>, uint64_t>;
    std::lock_guard<std::mutex> lock(mutex);
    return ++(*places)[members_];
  }

  c10::intrusive_ptr<c10d::Backend> transport_;
  const std::vector<int64_t> members_;
  std::vector<int> streams_ = std::vector<int>(kDevices, -1);
  uint64_t calls_ = 0;
  bool coalescing_ = false;
  std::vector<Operation> coalesced_;
};
}  // namespace

c10::intrusive_ptr<c10d::Backend> make_simccl(c10::intrusive_ptr<c10d::Backend> transport, int rank, int size,
                                              std::vector<int64_t> members) {
  return c10::make_intrusive<SimCCL>(std::move(transport), rank, size, std::move(members));
}

}  // namespace sim
