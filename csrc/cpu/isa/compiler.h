// Instructions that not every compiler has: their kernels are left out by one that is too old.
#pragma once

#if defined(__clang__)
#define GPT2FAST_COMPILER_SINCE(gcc, clang) (__clang_major__ >= (clang))
#else
#define GPT2FAST_COMPILER_SINCE(gcc, clang) (__GNUC__ >= (gcc))
#endif

#if defined(__x86_64__) && GPT2FAST_COMPILER_SINCE(11, 13)
#define GPT2FAST_HAS_AVX_VNNI
#endif
#if defined(__x86_64__) && (__has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>))
#define GPT2FAST_HAS_AMX
#endif
#if defined(__aarch64__) && GPT2FAST_COMPILER_SINCE(10, 16)
#define GPT2FAST_HAS_NEON_DOTS
#endif
