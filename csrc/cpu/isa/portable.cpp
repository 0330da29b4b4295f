// Every kernel for whatever the compiler was told to build for.
#define GPT2FAST_ISA portable
#include "../prelude.h"
#include "../simd/portable.h"

#include "../kernel_table.h"
