// Which instruction set runs: the best one here, or the one that GPT2FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa/compiler.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(GPT2FAST_HAS_NEON_DOTS) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(GPT2FAST_HAS_NEON_DOTS) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gpt2fast {

#if defined(__x86_64__)
extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_base;
extern const KernelTable kernels_avx2_vnni;
extern const KernelTable kernels_avx2;
#elif defined(__aarch64__)
extern const KernelTable kernels_neon_i8mm;
extern const KernelTable kernels_neon_dotprod;
extern const KernelTable kernels_neon;
#endif
extern const KernelTable kernels_portable;

namespace {

struct Candidate {
    const KernelTable* kernels;
    bool runs;
};

#if defined(__x86_64__)
// These are not in every compiler's __builtin_cpu_supports; it says of AVX2 whether the system
// saves the registers.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

#ifdef GPT2FAST_HAS_AVX_VNNI
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}
#endif
#endif

#ifdef GPT2FAST_HAS_NEON_DOTS
#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }  // HWCAP_ASIMDDP
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }    // HWCAP2_I8MM
#elif defined(__APPLE__)
bool has_feature(const char* name) {
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

const KernelTable& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const Candidate candidates[] = {
        {&kernels_avx512_bf16, vnni && __builtin_cpu_supports("avx512bf16")},
        {&kernels_avx512, vnni},
        {&kernels_avx512_base, avx512},
#ifdef GPT2FAST_HAS_AVX_VNNI
        {&kernels_avx2_vnni, avx2 && has_avx_vnni()},
#endif
        {&kernels_avx2, avx2},
        {&kernels_portable, true},
    };
#elif defined(__aarch64__)
    const Candidate candidates[] = {
#ifdef GPT2FAST_HAS_NEON_DOTS
        {&kernels_neon_i8mm, has_i8mm() && has_dotprod()},
        {&kernels_neon_dotprod, has_dotprod()},
#endif
        {&kernels_neon, true},
        {&kernels_portable, true},
    };
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
    static const Kernels chosen = [] {
        const KernelTable& table = choose();
        return Kernels{*table.ops, table.step, table.name};
    }();
    return chosen;
}

}  // namespace gpt2fast
