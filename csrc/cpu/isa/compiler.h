// What the compiler at work can compile: what it lacks is left out of the library.
#pragma once

#if defined(__x86_64__) && (__has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>))
#define GPT2FAST_HAS_AMX
#endif
