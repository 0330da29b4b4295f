// Stand-in for CUDA's header: names only, since the host computes with neither type.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {};
struct __nv_bfloat162 {};
float __bfloat162float(__nv_bfloat16);
__nv_bfloat16 __float2bfloat16_rn(float);
__nv_bfloat162 __floats2bfloat162_rn(float, float);
unsigned long __cvta_generic_to_shared(const void*);
