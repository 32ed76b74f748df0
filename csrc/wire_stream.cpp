#include "wire_stream.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace xorl {

WireStream::WireStream(at::Device device) {
  if (device.is_cpu()) return;
  // Of high priority: else a bucket that is ready queues behind the blocks of the kernel that fills the next one.
  stream_ = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true);
}

Departure WireStream::launch(const at::Tensor& bytes, const std::function<void()>& broadcast) const {
  if (!exists()) {
    broadcast();
    return std::nullopt;
  }
  c10::Event filled(stream_->device_type());
  filled.record(callers_stream());
  filled.block(*stream_);
  bytes.record_stream(*stream_);  // its memory is not given to others while it travels
  const c10::StreamGuard on_the_wire(*stream_);
  broadcast();
  Departure left(std::in_place, stream_->device_type());
  left->record(*stream_);
  return left;
}

void WireStream::hold_until(const Departure& departure) const {
  if (departure) departure->block(callers_stream());
}

c10::Stream WireStream::callers_stream() const {
  return c10::impl::VirtualGuardImpl(stream_->device_type()).getStream(stream_->device());
}

}  // namespace xorl
