// AdamW.
#include "../../launch/optimizer.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

// Contiguous lists of equal length; `masters` may be empty.
void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masters, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay) {
    GPT2FAST_CHECK(grads.size() == params.size() && exp_avgs.size() == params.size() &&
                       exp_avg_sqs.size() == params.size() &&
                       (masters.empty() || masters.size() == params.size()),
                   "params, grads, exp_avgs, exp_avg_sqs and masters must have equal lengths");
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor& param = params[i];
        const Tensor& updated = masters.empty() ? param : masters[i];
        if (!masters.empty()) check_floats(updated, "masters");
        check_same_type(grads[i], "a gradient", param, "its parameter");
        check_same_type(exp_avg_sqs[i], "a second moment", exp_avgs[i], "the first");
        GPT2FAST_CHECK(masters.empty() || float_dtype_of(exp_avgs[i]) == DType::float32,
                       "with masters, moments must be float32");
        float_dtype_of(param);
        const Tensor* const group[] = {&param, &grads[i], &exp_avgs[i], &exp_avg_sqs[i], &updated};
        for (const Tensor* each : group) {
            check_stored(*each, "a parameter, gradient or moment");
            check_device(*each, "gradients, moments and masters", param, "their parameter");
            GPT2FAST_CHECK(each->numel() == param.numel() && each->is_contiguous(),
                           "a parameter, its gradient and its moments must have one size and be "
                           "contiguous");
        }
    }
    // One call of the launcher for every kind: a device and a pair of dtypes.
    std::vector<bool> done(params.size());
    for (size_t first = 0; first < params.size(); ++first) {
        if (done[first]) continue;
        const OnDeviceOf on(params[first]);
        launch::AdamW args{{},
                           step,
                           lr,
                           beta1,
                           beta2,
                           eps,
                           weight_decay,
                           dtype_of(params[first]),
                           dtype_of(exp_avgs[first])};
        for (size_t i = first; i < params.size(); ++i) {
            if (done[i] || params[i].get_device_index() != params[first].get_device_index() ||
                dtype_of(params[i]) != args.dtype || dtype_of(exp_avgs[i]) != args.moment_dtype) {
                continue;
            }
            done[i] = true;
            args.tensors.push_back(
                {params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                 exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
                 masters.empty() ? nullptr : floats_of(masters[i]), params[i].numel()});
        }
        launch::adamw(args, on.stream);
    }
}

}  // namespace

GPT2FAST_OP(
    adamw,
    "params!, grads, exp_avgs!, exp_avg_sqs!, masters!, step, lr, beta1, beta2, eps, weight_decay");

}  // namespace gpt2fast::binding
