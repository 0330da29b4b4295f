// Which instruction set runs: the best one here, or the one that GPT2FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gpt2fast {

#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif
extern const Kernels kernels_portable;

namespace {

struct Candidate {
    const Kernels* kernels;
    bool runs;
};

const Kernels& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    const Candidate candidates[] = {
        {&kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
        {&kernels_avx512, avx512},
        {&kernels_avx2, avx2},
        {&kernels_portable, true},
    };
#elif defined(__aarch64__)
    const Candidate candidates[] = {{&kernels_neon, true}, {&kernels_portable, true}};
#else
    const Candidate candidates[] = {{&kernels_portable, true}};
#endif
    const char* forced = std::getenv("GPT2FAST_ISA");
    std::string names;
    for (const Candidate& candidate : candidates) {
        if (!candidate.runs) continue;
        if (forced == nullptr || *forced == '\0') return *candidate.kernels;
        if (std::strcmp(forced, candidate.kernels->name) == 0) return *candidate.kernels;
        names += (names.empty() ? "" : ", ") + std::string(candidate.kernels->name);
    }
    throw std::runtime_error("GPT2FAST_ISA=" + std::string(forced) +
                             " cannot run on this processor; choose one of " + names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace gpt2fast
