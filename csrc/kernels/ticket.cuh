// The last of several blocks to end adds up the partial sums of all of them: in a fixed order, and
// without another launch.
#pragma once

#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

// Called by all threads of `blocks` blocks that share a ticket: true in the block that comes last,
// which then sees everything that the others wrote before. The ticket is zero before and after.
// `shared` is one word of shared memory that nobody else uses.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks, unsigned* shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(ticket, 1u) + 1u == blocks ? 1u : 0u;
        if (*shared != 0u) atomicExch(ticket, 0u);
    }
    __syncthreads();
    if (*shared == 0u) return false;
    __threadfence();
    return true;
}

}  // namespace gpt2fast::kernels
