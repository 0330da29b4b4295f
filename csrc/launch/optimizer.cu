#include "optimizer.h"

#include <cmath>

#include "../kernels/optimizer.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using kernels::AdamWFactors;
using kernels::AdamWTable;

bool is_aligned(const AdamWTensor& tensor) {
    const void* all[] = {tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq,
                         tensor.master};
    for (const void* data : all) {
        if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
    }
    return true;
}

// A launch for every adamw_tensors tensors that are, or are not, aligned.
template <typename P, typename M, int Vector>
void launch_tables(const std::vector<AdamWTensor>& tensors, bool aligned,
                   const AdamWFactors& factors, void* stream) {
    AdamWTable table{};
    const auto flush = [&] {
        if (table.count == 0) return;
        device::launch(&kernels::adamw<P, M, Vector>,
                       dim3(unsigned(table.first_blocks[table.count])),
                       dim3(kernels::adamw_threads), 0, device::stream_of(stream), table, factors);
        table = {};
    };
    for (const AdamWTensor& tensor : tensors) {
        if (tensor.size == 0 || is_aligned(tensor) != aligned) continue;
        const int i = table.count++;
        table.params[i] = tensor.param;
        table.grads[i] = tensor.grad;
        table.exp_avgs[i] = tensor.exp_avg;
        table.exp_avg_sqs[i] = tensor.exp_avg_sq;
        table.masters[i] = tensor.master;
        table.sizes[i] = tensor.size;
        table.first_blocks[i + 1] =
            table.first_blocks[i] + int(ceil_div(tensor.size, kernels::adamw_part));
        if (table.count == kernels::adamw_tensors) flush();
    }
    flush();
}

}  // namespace

void adamw(const AdamW& args, void* stream) {
    const double step = double(args.step);
    const AdamWFactors factors{float(1.0 - args.lr * args.weight_decay),
                               float(args.beta1),
                               float(args.beta2),
                               float(1.0 - args.beta1),
                               float(1.0 - args.beta2),
                               float(args.lr / (1.0 - std::pow(args.beta1, step))),
                               float(1.0 / (1.0 - std::pow(args.beta2, step))),
                               float(args.eps)};
    with_float(args.dtype, [&](auto type) {
        using P = typename decltype(type)::type;
        constexpr int vector = 16 / int(sizeof(P));
        const auto update = [&](auto moment) {
            using M = typename decltype(moment)::type;
            launch_tables<P, M, vector>(args.tensors, true, factors, stream);
            launch_tables<P, M, 1>(args.tensors, false, factors, stream);
        };
        if (args.moment_dtype == args.dtype) return update(type);
        if (args.moment_dtype == DType::float32) return update(TypeOf<float>{});
        throw std::invalid_argument("moments are kept in the parameters' dtype or in float32");
    });
}

}  // namespace gpt2fast::launch
