// Launching: on the queue's device and stream, with the caller's device restored.
#pragma once
#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

#include "contrastive.h"

namespace pycse::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("pycse: CUDA: ") + what + ": " + cudaGetErrorString(status));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "no current device");
    if (before_ != device) check(cudaSetDevice(device), "cannot use the tensors' device");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// launch(stream) is one kernel launch; a kernel's own errors appear where PyTorch next waits for the device.
template <class Launch>
void launch_on(const Queue& queue, const char* kernel, Launch launch) {
  OnDevice guard(queue.device);
  launch(static_cast<cudaStream_t>(queue.stream));
  check(cudaGetLastError(), kernel);
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "no attribute");
  return value;
}

// Threads for a row of n elements of which each takes `width` at a time: whole warps, no more than there is work for.
inline int threads_for(int n, int width, int most) {
  const int warps = ceil_div(ceil_div(n, width), 32), limit = most / 32;
  return 32 * (warps < 1 ? 1 : warps < limit ? warps : limit);
}

}  // namespace pycse::cuda
