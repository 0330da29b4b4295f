// Intel's AMX: eight tile registers of up to 16 rows of 64 bytes, and products of them.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

// Written as assembly: the compilers' intrinsics take no register number from a template, and some
// do not tell that memory is read. The compiler itself uses no tile register.
struct Amx {
    // Until release() every switch between threads saves the tiles.
    static void configure(const TileConfig& config) {
        asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
    }
    static void release() { asm volatile("tilerelease" : : : "memory"); }

    template <int tile>
    static void clear() {
        asm volatile("tilezero %%tmm%c0" : : "i"(tile));
    }
    template <int tile>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(tile)
                     : "memory");
    }
    template <int tile>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "i"(tile)
                     : "memory");
    }

    // sums += a b, of signed bytes in int32.
    template <int sums, int a, int b>
    static void dot_int8() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
    }
    // sums += a b, of bfloat16 in float32.
    template <int sums, int a, int b>
    static void dot_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
    }
};

}  // namespace gpt2fast::GPT2FAST_ISA
