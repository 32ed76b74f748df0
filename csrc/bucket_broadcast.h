#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "packing.h"
#include "wire_stream.h"

namespace xorl {

// Broadcasts flat buckets from one rank of a process group to all others, several at a time: while one is on the wire
// the next one is filled. One thread uses it, except for `abort`. It gives no second chance: after a failure the group's
// ranks are out of step, so every further call fails too, and a new group is needed.
class BucketBroadcast {
 public:
  BucketBroadcast(c10::intrusive_ptr<c10d::ProcessGroup> group, int64_t root, at::Device device, double timeout_s,
                  int64_t num_slots);
  ~BucketBroadcast();
  BucketBroadcast(const BucketBroadcast&) = delete;
  BucketBroadcast& operator=(const BucketBroadcast&) = delete;

  // uint8 [num_bytes], to be filled for the next `send`. On the CPU, waits until the bucket that was in it has left;
  // elsewhere the caller's stream does, and the host goes on.
  at::Tensor slot(int64_t num_bytes);

  // Start the broadcast of `bytes`, a slot or any flat uint8 tensor, which is kept alive until it has left. On the CPU,
  // waits while as many others as there are slots are under way.
  void send(const at::Tensor& bytes);

  // Wait until everything sent has left.
  void finish();

  // Broadcast a list of tensors, whose sizes every rank knows, in buckets of at most bucket_bytes; see `cut`. Root packs
  // a bucket while the one before is on the wire, the others unpack it.
  void broadcast(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes);

  // End every wait with an error, now and later. Any thread may call it.
  void abort();

 private:
  using Clock = std::chrono::steady_clock;

  struct Slot {
    at::Tensor memory;
    at::Tensor bytes;  // what was last sent in its turn, in its memory or elsewhere
    Departure left;
  };

  // A bucket under way.
  struct Flight {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor bytes;
    size_t number;
    Clock::time_point sent_at;
    std::shared_ptr<bool> over;  // guarded by the bell; null: nobody rings, so `work` has to be asked
  };

  // Wakes who waits: another thread rings it when a bucket has left, and when all is aborted. It outlives us, since a
  // group may end a bucket that nobody waits for any more.
  struct Bell {
    std::mutex mutex;
    std::condition_variable rung;
    bool aborted = false;
  };

  void send_all(const std::vector<Load>& loads);
  void receive_all(const std::vector<Load>& loads);
  Slot& next_slot() { return slots_[num_sent_ % slots_.size()]; }
  at::Tensor memory_of(Slot& slot, int64_t num_bytes);
  void launch(const at::Tensor& bytes);
  void make_room();
  void await_departure(const Slot& oldest);
  void land_oldest();
  void await(const Flight& flight);
  bool is_over(const Flight& flight);
  std::shared_ptr<bool> ring_when_over(c10d::Work& work);
  bool is_aborted();
  void check_usable();
  [[noreturn]] void fail(const std::string& why);

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  const int64_t root_;
  const at::Device device_;
  const std::chrono::milliseconds timeout_;
  const WireStream wire_;
  std::vector<Slot> slots_;
  std::deque<Flight> flights_;  // oldest first
  Clock::time_point last_landing_{};
  size_t num_sent_ = 0;
  std::string failure_;  // why it cannot be used any more; empty: it can
  const std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
};

}  // namespace xorl
