#include "bucket_broadcast.h"

#include <algorithm>
#include <optional>
#include <thread>

#include <torch/python.h>

namespace xorl {

namespace {

constexpr std::chrono::microseconds kShortestNap{20};
constexpr std::chrono::microseconds kLongestNap{500};

at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.detach().flatten().view(at::kByte); }

// Consecutive tensors [begin, end) of a list that travel in one bucket.
struct Run {
  size_t begin;
  size_t end;
  int64_t num_bytes;
};

std::vector<Run> cut(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes) {
  std::vector<Run> runs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto num_bytes = static_cast<int64_t>(tensors[i].nbytes());
    if (num_bytes == 0) continue;
    const bool joins = !runs.empty() && runs.back().num_bytes + num_bytes <= bucket_bytes;
    if (!joins) runs.push_back({i, i, 0});
    runs.back().end = i + 1;
    runs.back().num_bytes += num_bytes;
  }
  return runs;
}

void pack(at::Tensor flat, const std::vector<at::Tensor>& tensors, const Run& run) {
  int64_t offset = 0;
  for (size_t i = run.begin; i < run.end; ++i) {
    const auto num_bytes = static_cast<int64_t>(tensors[i].nbytes());
    flat.narrow(0, offset, num_bytes).copy_(as_bytes(tensors[i]));
    offset += num_bytes;
  }
}

void unpack(const at::Tensor& flat, const std::vector<at::Tensor>& tensors, const Run& run) {
  int64_t offset = 0;
  for (size_t i = run.begin; i < run.end; ++i) {
    const auto num_bytes = static_cast<int64_t>(tensors[i].nbytes());
    at::Tensor target = tensors[i].detach();
    if (target.is_contiguous()) {
      target.view(-1).view(at::kByte).copy_(flat.narrow(0, offset, num_bytes));
    } else {  // through an aligned copy, since the bytes may lie at any offset
      target.copy_(flat.narrow(0, offset, num_bytes).clone().view(target.scalar_type()).view(target.sizes()));
    }
    offset += num_bytes;
  }
}

}  // namespace

BucketBroadcast::BucketBroadcast(c10::intrusive_ptr<c10d::ProcessGroup> group, int64_t root, at::Device device,
                                 double timeout_s)
    : group_(std::move(group)),
      root_(root),
      device_(device),
      timeout_(static_cast<int64_t>(timeout_s * 1000)) {
  TORCH_CHECK(group_, "group is None");
  TORCH_CHECK(root_ >= 0 && root_ < group_->getSize(), "root ", root_, " is not among ", group_->getSize(), " ranks");
  TORCH_CHECK(timeout_.count() > 0, "timeout_s is ", timeout_s);
}

BucketBroadcast::~BucketBroadcast() {
  // Destroying the last reference to a group joins its threads, one of which may wait for the interpreter.
  std::optional<pybind11::gil_scoped_release> no_gil;
  if (PyGILState_Check()) no_gil.emplace();
  for (Flight& flight : flights_) flight = {};
  group_.reset();
}

at::Tensor BucketBroadcast::slot(int64_t num_bytes) {
  TORCH_CHECK(num_bytes >= 0, "num_bytes is ", num_bytes);
  check_usable();
  await(flights_[num_sent_ % 2]);
  at::Tensor& slot = slots_[num_sent_ % 2];
  if (!slot.defined() || slot.numel() < num_bytes) {
    slot.reset();  // the old memory first, or both are needed at once
    slot = at::empty({num_bytes}, at::TensorOptions(at::kByte).device(device_));
  }
  return slot.narrow(0, 0, num_bytes);
}

void BucketBroadcast::send(const at::Tensor& bytes) {
  TORCH_CHECK(bytes.dim() == 1 && bytes.scalar_type() == at::kByte && bytes.is_contiguous(),
              "a bucket is flat uint8, got ", bytes.scalar_type(), " of shape ", bytes.sizes());
  TORCH_CHECK(bytes.device().type() == device_.type(), "the bucket is on ", bytes.device(), ", not on ", device_);
  check_usable();
  Flight& flight = flights_[num_sent_ % 2];
  await(flight);
  c10d::BroadcastOptions options;
  options.rootRank = root_;
  options.timeout = timeout_;
  options.asyncOp = true;
  std::vector<at::Tensor> tensors{bytes};
  try {
    flight = {group_->broadcast(tensors, options), bytes, Clock::now() + timeout_};
  } catch (const std::exception& error) {
    fail(error.what());
    throw;
  }
  ++num_sent_;
}

void BucketBroadcast::finish() {
  check_usable();
  await(flights_[num_sent_ % 2]);  // the older one
  await(flights_[(num_sent_ + 1) % 2]);
}

void BucketBroadcast::broadcast(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes) {
  TORCH_CHECK(bucket_bytes > 0, "bucket_bytes is ", bucket_bytes);
  const bool is_root = group_->getRank() == root_;
  std::optional<Run> arriving;  // sent to us, not unpacked yet
  const auto unpack_arrived = [&](Flight& flight) {
    const at::Tensor bytes = flight.bytes;
    await(flight);
    unpack(bytes, tensors, *arriving);
    arriving.reset();
  };
  for (const Run& run : cut(tensors, bucket_bytes)) {
    const at::Tensor& first = tensors[run.begin];
    const bool in_place = run.num_bytes > bucket_bytes && first.is_contiguous() && first.device() == device_;
    const at::Tensor bytes = in_place ? as_bytes(first) : slot(run.num_bytes);
    if (is_root && !in_place) pack(bytes, tensors, run);
    Flight& previous = flights_[(num_sent_ + 1) % 2];
    send(bytes);
    if (arriving) unpack_arrived(previous);
    if (!is_root && !in_place) arriving = run;
  }
  if (arriving) unpack_arrived(flights_[(num_sent_ + 1) % 2]);
  finish();
}

void BucketBroadcast::abort() {
  aborted_ = true;
  group_->abort();  // ends NCCL's work; gloo's ends by its timeout, with nobody waiting for it
}

void BucketBroadcast::await(Flight& flight) {
  if (!flight.work) return;
  auto nap = kShortestNap;
  while (!flight.work->isCompleted()) {
    if (aborted_) {
      fail("it was aborted");
    } else if (Clock::now() > flight.deadline) {
      group_->abort();
      fail("a bucket of " + std::to_string(flight.bytes.numel()) + " bytes was not taken within " +
           std::to_string(timeout_.count() / 1000.0) + " s");
    }
    check_usable();
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, kLongestNap);
  }
  try {
    flight.work->wait();  // throws what went wrong; on CUDA, orders the current stream after the broadcast
  } catch (const std::exception& error) {
    fail(error.what());
    throw;
  }
  flight = {};
}

void BucketBroadcast::check_usable() {
  if (aborted_ && failure_.empty()) fail("it was aborted");
  TORCH_CHECK(failure_.empty(), "the broadcast failed: ", failure_);
}

void BucketBroadcast::fail(const std::string& why) {
  if (failure_.empty()) failure_ = why;
}

void register_bucket_broadcast(pybind11::module_& module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<BucketBroadcast>(module, "BucketBroadcast")
      .def(py::init<c10::intrusive_ptr<c10d::ProcessGroup>, int64_t, at::Device, double>(), py::arg("group"),
           py::arg("root"), py::arg("device"), py::arg("timeout_s"))
      .def("slot", &BucketBroadcast::slot, py::arg("num_bytes"), no_gil)
      .def("send", &BucketBroadcast::send, py::arg("bytes"), no_gil)
      .def("finish", &BucketBroadcast::finish, no_gil)
      .def("broadcast", &BucketBroadcast::broadcast, py::arg("tensors"), py::arg("bucket_bytes"), no_gil)
      .def("abort", &BucketBroadcast::abort, no_gil);
}

}  // namespace xorl
