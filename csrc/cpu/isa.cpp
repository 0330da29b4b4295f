// Which instruction set runs: the best one here, or the one that GPT2FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa/compiler.h"
#include "kernels.h"

#ifdef GPT2FAST_HAS_AMX
#include <cpuid.h>
#endif
#if defined(GPT2FAST_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gpt2fast {

#if defined(__x86_64__)
#ifdef GPT2FAST_HAS_AMX
extern const StepKernels kernels_avx512_amx;
#endif
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
    bool on_tiles = false;
};

#ifdef GPT2FAST_HAS_AMX
// Asked of the processor itself: the names of its parts are not known to all compilers.
bool has_tiles() {
    constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           (edx & (bfloat16 | tile | int8)) == (bfloat16 | tile | int8);
}

// Linux saves AMX's tiles for processes that ask for it, for all their threads and children.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Kernels with_step(const StepKernels& own) {
    Kernels all = *own.others;
    all.name = own.name;
    all.step = own.step;
    all.step_workspace = own.step_workspace;
    return all;
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef GPT2FAST_HAS_AMX
    static const Kernels avx512_amx = with_step(kernels_avx512_amx);
#endif
    const Candidate candidates[] = {
#ifdef GPT2FAST_HAS_AMX
        {&avx512_amx, avx512_bf16 && has_tiles(), true},
#endif
        {&kernels_avx512_bf16, avx512_bf16},
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
        const bool wanted = forced == nullptr || *forced == '\0' ||
                            std::strcmp(forced, candidate.kernels->name) == 0;
        if (wanted) {
            if (!candidate.on_tiles || may_use_tiles()) return *candidate.kernels;
            continue;
        }
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
