#include "embedding.h"

#include "../kernels/embedding.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {

using namespace kernels;

int64_t embedding_partials(int64_t count) { return 2 * ceil_div(count, embedding_stretch); }

void embedding_forward(const Embedding& args, void* stream) {
    const int64_t bytes = size_of(args.dtype);
    const bool aligned = is_vector_aligned(args.wte, args.columns, 0, bytes) &&
                         is_vector_aligned(args.wpe, args.columns, 0, bytes);
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        device::launch(&kernels::embedding_forward<T, decltype(vector)::value>,
                       dim3(unsigned(args.count)), dim3(embedding_threads), 0,
                       device::stream_of(stream), args.tokens, args.positions,
                       static_cast<const T*>(args.wte), static_cast<const T*>(args.wpe),
                       static_cast<T*>(args.out), args.wte_rows, args.wpe_rows, int(args.columns));
    });
}

void embedding_backward(const EmbeddingBackward& args, void* stream) {
    const bool aligned =
        is_vector_aligned(args.grad, args.columns, args.grad_stride, size_of(args.dtype));
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        constexpr int width = decltype(vector)::value;
        const dim3 grid(unsigned(ceil_div(args.count, embedding_stretch)),
                        unsigned(ceil_div(args.columns, embedding_threads * width)));
        device::launch(&kernels::embedding_backward<T, width>, grid, dim3(embedding_threads), 0,
                       device::stream_of(stream), static_cast<const T*>(args.grad), args.sorted,
                       args.order, static_cast<T*>(args.grad_table), args.partials, args.count,
                       int(args.columns), args.grad_stride);
        device::launch(&embedding_join<T, width>, grid, dim3(embedding_threads), 0,
                       device::stream_of(stream), args.sorted, args.partials,
                       static_cast<T*>(args.grad_table), args.count, int(args.columns));
    });
}

}  // namespace gpt2fast::launch
