// Cross-entropy of a chunk of logits.
#include "../../launch/cross_entropy.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

void cross_entropy(Tensor logits, Tensor targets, Tensor losses, int64_t ignore_index,
                   Tensor factor, bool differentiate) {
    const OnDeviceOf on(logits);
    check_rows(logits, "logits", {-1, -1});
    check_contiguous(targets, "targets", {logits.size(0)});
    check_integers(targets, "targets");
    check_contiguous(losses, "losses", {logits.size(0)});
    check_floats(losses, "losses");
    check_stored(factor, "factor");
    check_floats(factor, "factor");
    GPT2FAST_CHECK(factor.numel() == 1, "factor must be one number");
    for (const Tensor* each : {&targets, &losses, &factor}) {
        check_device(*each, "targets, losses and factor", logits, "logits");
    }
    launch::cross_entropy(
        {logits.mutable_data_ptr(), static_cast<const int64_t*>(targets.const_data_ptr()),
         static_cast<const float*>(factor.const_data_ptr()), floats_of(losses), logits.size(0),
         logits.size(1), logits.stride(0), ignore_index, differentiate, float_dtype_of(logits)},
        on.stream);
}

}  // namespace

GPT2FAST_OP(cross_entropy, "logits!, targets, losses!, ignore_index, factor, differentiate");

}  // namespace gpt2fast::binding
