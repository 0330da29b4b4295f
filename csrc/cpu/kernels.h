// What every instruction set offers: one table of functions, filled by isa/<name>.cpp.
//
// A kernel of a single op handles rows [begin, end) of its arguments and starts no thread: who
// calls decides how ranges are spread. Only the whole-model step takes a thread team.
#pragma once

#include <cstdint>

#include "types.h"

namespace gpt2fast {

// out[i, j] = gelu(x[i, j] + bias[j]); rows i of x are x_stride elements apart, of out `columns`.
struct BiasGelu {
    const void* x;
    const void* bias;
    void* out;
    int64_t columns;
    int64_t x_stride;
    DType dtype;
};

struct StepArgs;
class Member;

struct Kernels {
    const char* name;
    void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);
    void (*step)(const StepArgs&, Member&);
    int64_t (*step_workspace)(const StepArgs&, int threads);  // bytes
};

// The table of the best instruction set that this processor has, or of the one that the
// environment variable GPT2FAST_ISA names. Throws std::runtime_error if that one cannot run here.
const Kernels& kernels();

}  // namespace gpt2fast
