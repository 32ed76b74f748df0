#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace xorl {

// Broadcasts flat buckets from one rank of a process group to all others, two at a time: while one is on the wire the
// next one is filled. One thread uses it, except for `abort`. It gives no second chance: after a failure the group's
// ranks are out of step, so every further call fails too, and a new group is needed.
class BucketBroadcast {
 public:
  BucketBroadcast(c10::intrusive_ptr<c10d::ProcessGroup> group, int64_t root, at::Device device, double timeout_s);
  ~BucketBroadcast();
  BucketBroadcast(const BucketBroadcast&) = delete;
  BucketBroadcast& operator=(const BucketBroadcast&) = delete;

  // uint8 [num_bytes], to be filled for the next `send`. Waits until the bucket that was in it has left.
  at::Tensor slot(int64_t num_bytes);

  // Start the broadcast of `bytes`, a slot or any flat uint8 tensor, which is kept alive until it has left. Waits only
  // while two others are under way.
  void send(const at::Tensor& bytes);

  // Wait until everything sent has left.
  void finish();

  // Broadcast a list of tensors, whose sizes every rank knows, in buckets of at most bucket_bytes; a larger tensor
  // travels from its own storage. Root packs a bucket while the one before is on the wire, the others unpack it.
  void broadcast(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes);

  // End every wait with an error, now and later. Callable from any thread.
  void abort();

 private:
  using Clock = std::chrono::steady_clock;

  struct Flight {
    c10::intrusive_ptr<c10d::Work> work;  // null: nothing under way
    at::Tensor bytes;
    Clock::time_point deadline;
  };

  void await(Flight& flight);
  void check_usable();
  void fail(const std::string& why);

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  const int64_t root_;
  const at::Device device_;
  const std::chrono::milliseconds timeout_;
  std::array<at::Tensor, 2> slots_;
  std::array<Flight, 2> flights_;
  size_t num_sent_ = 0;
  std::string failure_;  // why it cannot be used any more; empty: it can
  std::atomic<bool> aborted_{false};
};

}  // namespace xorl
