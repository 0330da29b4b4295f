#include "cross_entropy.h"

#include "../kernels/cross_entropy.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

template <typename T, int Vector, bool Differentiate>
void launch_rows(const CrossEntropy& args, void* stream) {
    device::launch(&kernels::cross_entropy<T, Vector, Differentiate>, dim3(unsigned(args.rows)),
                   dim3(kernels::cross_entropy_threads),
                   kernels::cross_entropy_threads / 32 * sizeof(kernels::ScaledSum),
                   device::stream_of(stream), static_cast<T*>(args.logits), args.targets,
                   args.factor, args.losses, int(args.columns), args.stride, args.ignore_index);
}

}  // namespace

void cross_entropy(const CrossEntropy& args, void* stream) {
    // The vocabulary need not be a multiple of anything, but every row has to begin aligned.
    const bool aligned = is_vector_aligned(args.logits, 0, args.stride, size_of(args.dtype));
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        if (args.differentiate) {
            launch_rows<T, decltype(vector)::value, true>(args, stream);
        } else {
            launch_rows<T, decltype(vector)::value, false>(args, stream);
        }
    });
}

}  // namespace gpt2fast::launch
