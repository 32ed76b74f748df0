#pragma once

#include <vector>

#include <ATen/ATen.h>

namespace xorl {

// Tensors of a list that travel in one broadcast, back to back.
struct Load {
  std::vector<at::Tensor> tensors;
  int64_t num_bytes = 0;
};

// Cut a list into loads of at most `bucket_bytes`. It follows from the sizes alone, so that all ranks cut alike.
//
// A tensor from kAlone bytes on, or larger than a bucket, is a load by itself, which can travel from its own storage.
// The small ones between such are gathered over the whole list, so that none costs a broadcast of its own.
std::vector<Load> cut(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes);

// Whether a load can be sent from, or received into, the storage of its only tensor on that device.
bool is_flat(const Load& load, at::Device device);

// The bytes of a contiguous tensor, uint8 [num_bytes].
at::Tensor as_bytes(const at::Tensor& tensor);

// Copy a load's tensors into a flat bucket.
void pack(const at::Tensor& bucket, const Load& load);

// Copy a flat bucket into a load's tensors, whatever their strides.
void unpack(const at::Tensor& bucket, const Load& load);

}  // namespace xorl
