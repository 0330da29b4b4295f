// Shared by all launchers. They know neither torch nor, here, CUDA: a caller hands them raw
// pointers into the device's memory, sizes and strides in elements, and the stream.
//
// A launcher allocates nothing, waits for nothing and reads nothing from the device, so that it
// can be captured in a CUDA graph; what its kernels need besides is among its arguments.
// It throws std::invalid_argument for what no kernel can run, std::runtime_error if CUDA fails.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/shapes.h"

namespace gpt2fast::launch {

// Launchers work on the current device of the CUDA run-time that they are linked with, which may be
// another one than their caller's: call this first.
void use_device(int index);

}  // namespace gpt2fast::launch
