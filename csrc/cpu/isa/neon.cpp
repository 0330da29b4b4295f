// Every kernel for AArch64, all of which has NEON.
#if defined(__aarch64__)
#define GPT2FAST_ISA neon
#define GPT2FAST_SIMD "simd/neon.h"
#include "../kernel_table.h"
#endif
