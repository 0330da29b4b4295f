// Every kernel for avx2,fma,f16c.
#if defined(__x86_64__)

#define GPT2FAST_ISA avx2
#include "../prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../simd/avx2.h"

#include "../kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
