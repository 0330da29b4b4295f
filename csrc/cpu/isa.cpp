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
#if defined(GPT2FAST_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(GPT2FAST_HAS_NEON_DOTS) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(GPT2FAST_HAS_NEON_DOTS) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gpt2fast {

#if defined(__x86_64__)
extern const KernelTable kernels_avx512_amx;
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
#endif

// Linux saves AMX's tiles for processes that ask for it, for all their threads and children.
bool may_use_tiles() {
#if defined(GPT2FAST_HAS_AMX) && defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

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
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    const Candidate candidates[] = {
#ifdef GPT2FAST_HAS_AMX
        {&kernels_avx512_amx, bf16 && has_tiles(), true},
#endif
        {&kernels_avx512_bf16, bf16},
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
    static const Kernels chosen = [] {
        const KernelTable& table = choose();
        return Kernels{*table.ops, table.step, table.name};
    }();
    return chosen;
}

}  // namespace gpt2fast
