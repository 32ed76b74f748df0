#include "bucket_broadcast.h"

#include <algorithm>
#include <optional>

#include <torch/python.h>

namespace xorl {

namespace {

// How often a device's work is asked whether it is over; it only matters at the end of a list.
constexpr std::chrono::microseconds kNap{100};

std::string describe(size_t number, const at::Tensor& bytes) {
  return "bucket " + std::to_string(number) + " of " + std::to_string(bytes.numel()) + " bytes";
}

// What went wrong, without the stack that torch appends.
std::string reason(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace

BucketBroadcast::BucketBroadcast(c10::intrusive_ptr<c10d::ProcessGroup> group, int64_t root, at::Device device,
                                 double timeout_s, int64_t num_slots)
    : group_(std::move(group)),
      root_(root),
      device_(device),
      timeout_(static_cast<int64_t>(timeout_s * 1000)),
      wire_(device),
      slots_(std::max<int64_t>(num_slots, 1)) {
  TORCH_CHECK(group_, "group is None");
  TORCH_CHECK(root_ >= 0 && root_ < group_->getSize(), "root ", root_, " is not among ", group_->getSize(), " ranks");
  TORCH_CHECK(timeout_.count() > 0, "timeout_s is ", timeout_s);
  TORCH_CHECK(num_slots > 0, "num_slots is ", num_slots);
}

BucketBroadcast::~BucketBroadcast() {
  // Destroying the last reference to a group joins its threads, one of which may wait for the interpreter.
  std::optional<pybind11::gil_scoped_release> no_gil;
  if (PyGILState_Check()) no_gil.emplace();
  flights_.clear();
  slots_.clear();
  group_.reset();
}

at::Tensor BucketBroadcast::slot(int64_t num_bytes) {
  TORCH_CHECK(num_bytes >= 0, "num_bytes is ", num_bytes);
  check_usable();
  make_room();
  Slot& slot = next_slot();
  wire_.hold_until(slot.left);
  return memory_of(slot, num_bytes);
}

void BucketBroadcast::send(const at::Tensor& bytes) {
  TORCH_CHECK(bytes.dim() == 1 && bytes.scalar_type() == at::kByte && bytes.is_contiguous(),
              "a bucket is flat uint8, got ", bytes.scalar_type(), " of shape ", bytes.sizes());
  TORCH_CHECK(bytes.device().type() == device_.type(), "the bucket is on ", bytes.device(), ", not on ", device_);
  check_usable();
  make_room();
  launch(bytes);
}

void BucketBroadcast::finish() {
  check_usable();
  while (!flights_.empty()) land_oldest();
}

void BucketBroadcast::broadcast(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes) {
  TORCH_CHECK(bucket_bytes > 0, "bucket_bytes is ", bucket_bytes);
  finish();
  const std::vector<Load> loads = cut(tensors, bucket_bytes);
  group_->getRank() == root_ ? send_all(loads) : receive_all(loads);
  finish();
}

void BucketBroadcast::abort() {
  {
    const std::lock_guard lock(bell_->mutex);
    bell_->aborted = true;
  }
  bell_->rung.notify_all();
  group_->abort();  // ends NCCL's work; gloo's ends by its timeout, with nobody waiting for it
}

void BucketBroadcast::send_all(const std::vector<Load>& loads) {
  for (const Load& load : loads) {
    if (is_flat(load, device_)) {
      send(as_bytes(load.tensors[0]));
    } else {
      const at::Tensor bytes = slot(load.num_bytes);
      pack(bytes, load);
      send(bytes);
    }
  }
}

// As many buckets as there are slots are expected at any time, so that one arrives while another is unpacked.
void BucketBroadcast::receive_all(const std::vector<Load>& loads) {
  const size_t ahead = slots_.size();
  const size_t first = num_sent_;
  for (size_t i = 0; i < loads.size() + ahead; ++i) {
    if (i >= ahead) {
      const Slot& slot = slots_[(first + i) % ahead];
      const Load& load = loads[i - ahead];
      await_departure(slot);
      if (!is_flat(load, device_)) unpack(slot.bytes, load);
    }
    if (i < loads.size()) {
      const Load& load = loads[i];
      launch(is_flat(load, device_) ? as_bytes(load.tensors[0]) : memory_of(next_slot(), load.num_bytes));
    }
  }
}

at::Tensor BucketBroadcast::memory_of(Slot& slot, int64_t num_bytes) {
  if (!slot.memory.defined() || slot.memory.numel() < num_bytes) {
    slot.memory.reset();  // the old one first, or both are needed at once
    slot.bytes.reset();
    slot.memory = at::empty({num_bytes}, at::TensorOptions(at::kByte).device(device_));
  }
  return slot.memory.narrow(0, 0, num_bytes);
}

void BucketBroadcast::launch(const at::Tensor& bytes) {
  c10d::BroadcastOptions options;
  options.rootRank = root_;
  options.timeout = timeout_;
  options.asyncOp = !wire_.exists();  // else on the stream that is current: the wire
  std::vector<at::Tensor> tensors{bytes};
  c10::intrusive_ptr<c10d::Work> work;
  Slot& slot = next_slot();
  try {
    slot.left = wire_.launch(bytes, [&] {
      work = group_->broadcast(tensors, options);
      if (wire_.exists()) work->wait();  // the stream does, not the host
    });
  } catch (const std::exception& error) {
    fail(describe(num_sent_, bytes) + ": " + reason(error));
  }
  slot.bytes = bytes;
  flights_.push_back({work, bytes, num_sent_, Clock::now(), ring_when_over(*work)});
  ++num_sent_;
}

// Before a slot's turn comes again. A device's host runs ahead, and only looks who has landed meanwhile.
void BucketBroadcast::make_room() {
  if (wire_.exists()) {
    while (!flights_.empty() && is_over(flights_.front())) land_oldest();
  } else if (flights_.size() == slots_.size()) {
    land_oldest();
  }
}

// What the caller does next, on the host or its stream, comes after the oldest bucket.
void BucketBroadcast::await_departure(const Slot& oldest) {
  if (wire_.exists()) {
    wire_.hold_until(oldest.left);
  } else {
    land_oldest();
  }
}

void BucketBroadcast::land_oldest() {
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  await(flight);
  last_landing_ = Clock::now();
}

// A bucket's time runs from when its turn came: it was sent and the one before had left.
void BucketBroadcast::await(const Flight& flight) {
  const auto deadline = std::max(flight.sent_at, last_landing_) + timeout_;
  while (!is_over(flight)) {
    if (is_aborted()) fail("it was aborted in " + describe(flight.number, flight.bytes));
    if (Clock::now() >= deadline) {
      group_->abort();
      fail(describe(flight.number, flight.bytes) + " was not taken within " +
           std::to_string(timeout_.count() / 1000.0) + " s");
    }
    std::unique_lock lock(bell_->mutex);
    const auto wake_at = flight.over ? deadline : std::min(deadline, Clock::now() + kNap);
    bell_->rung.wait_until(lock, wake_at, [&] { return bell_->aborted || (flight.over && *flight.over); });
  }
  try {
    flight.work->wait();  // throws what went wrong
  } catch (const std::exception& error) {
    group_->abort();
    fail(describe(flight.number, flight.bytes) + ": " + reason(error));
  }
}

bool BucketBroadcast::is_over(const Flight& flight) {
  if (!flight.over) return flight.work->isCompleted();
  const std::lock_guard lock(bell_->mutex);
  return *flight.over;
}

// A device's future is over as soon as its work is launched, so there nobody rings.
std::shared_ptr<bool> BucketBroadcast::ring_when_over(c10d::Work& work) {
  if (wire_.exists()) return nullptr;
  auto over = std::make_shared<bool>(false);
  work.getFuture()->addCallback([bell = bell_, over](c10::ivalue::Future&) {
    {
      const std::lock_guard lock(bell->mutex);
      *over = true;
    }
    bell->rung.notify_all();
  });
  return over;
}

bool BucketBroadcast::is_aborted() {
  const std::lock_guard lock(bell_->mutex);
  return bell_->aborted;
}

void BucketBroadcast::check_usable() {
  if (failure_.empty() && is_aborted()) failure_ = "it was aborted";
  TORCH_CHECK(failure_.empty(), "the broadcast failed: ", failure_);
}

void BucketBroadcast::fail(const std::string& why) {
  failure_ = why;
  TORCH_CHECK(false, "the broadcast failed: ", failure_);
}

void register_bucket_broadcast(pybind11::module_& module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<BucketBroadcast>(module, "BucketBroadcast")
      .def(py::init<c10::intrusive_ptr<c10d::ProcessGroup>, int64_t, at::Device, double, int64_t>(), py::arg("group"),
           py::arg("root"), py::arg("device"), py::arg("timeout_s"), py::arg("num_slots") = 2)
      .def("slot", &BucketBroadcast::slot, py::arg("num_bytes"), no_gil)
      .def("send", &BucketBroadcast::send, py::arg("bytes"), no_gil)
      .def("finish", &BucketBroadcast::finish, no_gil)
      .def("broadcast", &BucketBroadcast::broadcast, py::arg("tensors"), py::arg("bucket_bytes"), no_gil)
      .def("abort", &BucketBroadcast::abort, no_gil);
}

}  // namespace xorl
