#include "packing.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <ATen/core/grad_mode.h>

namespace xorl {

namespace {

// Beyond it two copies in memory cost more than a broadcast's fixed cost: about 1 MiB over gloo on loopback.
constexpr int64_t kAlone = 1 << 20;

int64_t num_bytes_of(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_conj() && !tensor.is_neg(),
              "only tensors that are their bytes can be sent, not one that is sparse, conjugated or negated");
  return static_cast<int64_t>(tensor.nbytes());
}

// A part of a bucket for each tensor.
std::vector<at::Tensor> places(const at::Tensor& bucket, const Load& load) {
  std::vector<at::Tensor> parts;
  parts.reserve(load.tensors.size());
  int64_t offset = 0;
  for (const at::Tensor& tensor : load.tensors) {
    const int64_t num_bytes = num_bytes_of(tensor);
    parts.push_back(bucket.narrow(0, offset, num_bytes));
    offset += num_bytes;
  }
  return parts;
}

bool all_on_cpu(const at::Tensor& bucket, const Load& load) {
  return bucket.is_cpu() && std::all_of(load.tensors.begin(), load.tensors.end(),
                                        [](const at::Tensor& tensor) { return tensor.is_cpu(); });
}

void copy_strided(at::Tensor target, const at::Tensor& bytes) {
  // through a copy that is aligned, since the bytes may lie at any offset
  target.copy_(bytes.clone().view(target.scalar_type()).view(target.sizes()));
}

// On the CPU a tensor costs less to copy than to make views of, so these two deal in addresses.

void pack_on_cpu(const at::Tensor& bucket, const Load& load) {
  auto* next = bucket.mutable_data_ptr<uint8_t>();
  for (const at::Tensor& tensor : load.tensors) {
    const at::Tensor flat = tensor.contiguous();
    std::memcpy(next, flat.const_data_ptr(), flat.nbytes());
    next += flat.nbytes();
  }
}

void unpack_on_cpu(const at::Tensor& bucket, const Load& load) {
  const auto* next = bucket.const_data_ptr<uint8_t>();
  for (const at::Tensor& tensor : load.tensors) {
    const auto num_bytes = static_cast<int64_t>(tensor.nbytes());
    if (tensor.is_contiguous()) {
      std::memcpy(tensor.mutable_data_ptr(), next, num_bytes);
    } else {
      copy_strided(tensor, bucket.narrow(0, next - bucket.const_data_ptr<uint8_t>(), num_bytes));
    }
    next += num_bytes;
  }
}

}  // namespace

std::vector<Load> cut(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes) {
  std::vector<Load> loads;
  Load small;
  for (const at::Tensor& tensor : tensors) {
    const int64_t num_bytes = num_bytes_of(tensor);
    if (num_bytes == 0) continue;
    if (num_bytes >= std::min(kAlone, bucket_bytes)) {
      loads.push_back({{tensor}, num_bytes});
      continue;
    }
    if (small.num_bytes + num_bytes > bucket_bytes) loads.push_back(std::exchange(small, {}));
    small.tensors.push_back(tensor);
    small.num_bytes += num_bytes;
  }
  if (!small.tensors.empty()) loads.push_back(std::move(small));
  return loads;
}

bool is_flat(const Load& load, at::Device device) {
  return load.tensors.size() == 1 && load.tensors[0].is_contiguous() && load.tensors[0].device() == device;
}

at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.detach().flatten().view(at::kByte); }

void pack(const at::Tensor& bucket, const Load& load) {
  const at::NoGradGuard no_grad;
  if (all_on_cpu(bucket, load)) return pack_on_cpu(bucket, load);
  std::vector<at::Tensor> sources;
  sources.reserve(load.tensors.size());
  for (const at::Tensor& tensor : load.tensors) sources.push_back(as_bytes(tensor));
  std::vector<at::Tensor> parts = places(bucket, load);
  at::_foreach_copy_(parts, sources);  // one launch for many
}

void unpack(const at::Tensor& bucket, const Load& load) {
  const at::NoGradGuard no_grad;
  if (all_on_cpu(bucket, load)) return unpack_on_cpu(bucket, load);
  const std::vector<at::Tensor> parts = places(bucket, load);
  std::vector<at::Tensor> targets, sources;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (load.tensors[i].is_contiguous()) {
      targets.push_back(as_bytes(load.tensors[i]));
      sources.push_back(parts[i]);
    } else {
      copy_strided(load.tensors[i], parts[i]);
    }
  }
  if (!targets.empty()) at::_foreach_copy_(targets, sources);
}

}  // namespace xorl
