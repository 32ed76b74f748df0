#pragma once

#include <functional>
#include <optional>

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

namespace xorl {

// When a slot's bucket has left, in the order of the device. Never set on a device without streams.
using Departure = std::optional<c10::Event>;

// The stream that buckets travel on, beside the one that produces them. It speaks c10's language for all devices, so it
// compiles without CUDA. The CPU has no streams: there the host does one thing after the other, and this does nothing.
class WireStream {
 public:
  explicit WireStream(at::Device device);

  bool exists() const { return stream_.has_value(); }

  // Launch a broadcast of `bytes` on the wire, after all that the caller's stream was given so far.
  Departure launch(const at::Tensor& bytes, const std::function<void()>& broadcast) const;

  // What the caller's stream is given from now on comes after that departure. The host goes on.
  void hold_until(const Departure& departure) const;

 private:
  c10::Stream callers_stream() const;

  std::optional<c10::Stream> stream_;
};

}  // namespace xorl
