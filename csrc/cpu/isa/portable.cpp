// Every kernel for whatever the compiler was told to build for.
#define GPT2FAST_ISA portable
#define GPT2FAST_SIMD "simd/portable.h"
#include "../kernel_table.h"
