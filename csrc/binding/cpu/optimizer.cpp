// AdamW.
#include "tensors.h"

#include <cmath>

namespace gpt2fast::binding {
namespace {

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
           double eps, double weight_decay) {
    constexpr int64_t piece_size = 16384;
    std::vector<AdamWPiece> pieces;
    GPT2FAST_CHECK(grads.size() == params.size() && exp_avgs.size() == params.size() &&
                       exp_avg_sqs.size() == params.size(),
                   "params, grads, exp_avgs and exp_avg_sqs must have equal lengths");
    for (size_t i = 0; i < params.size(); ++i) {
        const DType dtype = float_dtype_of(params[i]), moment_dtype = float_dtype_of(exp_avgs[i]);
        check_same_type(grads[i], "gradients", params[i], "their parameter");
        check_same_type(exp_avg_sqs[i], "averages of squares", exp_avgs[i], "the others");
        for (const Tensor* each : {&params[i], &grads[i], &exp_avgs[i], &exp_avg_sqs[i]}) {
            check_stored(*each, "a parameter, gradient or moment");
            GPT2FAST_CHECK(each->numel() == params[i].numel() && each->is_contiguous(),
                           "a parameter, its gradient and its moments must have one size and be "
                           "contiguous");
        }
        for (int64_t at = 0; at < params[i].numel(); at += piece_size) {
            const auto place = [&](const Tensor& x) {
                return static_cast<uint8_t*>(x.mutable_data_ptr()) + at * int64_t(x.element_size());
            };
            const auto* grad = static_cast<const uint8_t*>(grads[i].const_data_ptr());
            pieces.push_back({place(params[i]), grad + at * int64_t(grads[i].element_size()),
                              place(exp_avgs[i]), place(exp_avg_sqs[i]),
                              std::min(piece_size, params[i].numel() - at), dtype, moment_dtype});
        }
    }
    const AdamW args{pieces.data(),
                     float(beta1),
                     float(beta2),
                     float(1.0 - beta1),
                     float(1.0 - beta2),
                     float(1.0 - lr * weight_decay),
                     float(lr / (1.0 - std::pow(beta1, double(step)))),
                     float(1.0 / std::sqrt(1.0 - std::pow(beta2, double(step)))),
                     float(eps)};
    spread(kernels().adamw, args, int64_t(pieces.size()), piece_size);
}

}  // namespace

GPT2FAST_OP(adamw,
            "params!, grads, exp_avgs!, exp_avg_sqs!, step, lr, beta1, beta2, eps, weight_decay");

}  // namespace gpt2fast::binding
