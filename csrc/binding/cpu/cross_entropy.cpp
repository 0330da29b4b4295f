// Cross-entropy of a chunk of logits.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

// Losses of rows of logits; with `differentiate` their gradients times `factor` take their place.
void cross_entropy(Tensor logits, Tensor targets, Tensor losses, int64_t ignore_index,
                   double factor, bool differentiate) {
    check_contiguous(logits, "logits", {-1, -1});
    float_dtype_of(logits);
    const int64_t rows = logits.size(0), columns = logits.size(1);
    check_contiguous(targets, "targets", {rows});
    check_integers(targets, "targets");
    check_contiguous(losses, "losses", {rows});
    check_floats(losses, "losses");
    const auto* classes = static_cast<const int64_t*>(targets.const_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
        GPT2FAST_CHECK(classes[i] == ignore_index || (classes[i] >= 0 && classes[i] < columns),
                       "targets[", i, "] = ", classes[i], " is neither a class in 0 .. ",
                       columns - 1, " nor ignore_index=", ignore_index);
    }
    const CrossEntropy args{logits.mutable_data_ptr(),
                            classes,
                            floats_of(losses),
                            columns,
                            ignore_index,
                            float(factor),
                            differentiate,
                            dtype_of(logits)};
    spread(kernels().cross_entropy, args, rows, columns);
}

}  // namespace

GPT2FAST_OP(cross_entropy, "logits!, targets, losses!, ignore_index, factor, differentiate");

}  // namespace gpt2fast::binding
