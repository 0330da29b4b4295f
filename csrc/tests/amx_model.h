// AMX in plain C++: what the instructions of simd/amx.h do, by Intel's manual, for processors
// without them. What would be an invalid operation there throws here.
#pragma once

#include "cpu/amx.h"
#include "testing.h"

namespace gpt2fast::GPT2FAST_ISA {

struct AmxModel {
    static void configure(const TileConfig& config) {
        testing::expect(config.palette == 1 && config.start_row == 0, "a palette that AMX lacks");
        for (int i = 0; i < 8; ++i) {
            testing::expect(config.bytes[i] <= 64 && config.rows[i] <= 16, "a tile too large");
            testing::expect((config.bytes[i] == 0) == (config.rows[i] == 0), "half a tile");
            tiles[i] = {config.rows[i], config.bytes[i], {}};
        }
        configured = true;
    }
    static void release() { configured = false; }

    template <int tile>
    static void clear() {
        std::memset(at(tile).data, 0, sizeof at(tile).data);
    }
    template <int tile>
    static void load(const void* from, int64_t stride) {
        clear<tile>();
        Tile& to = at(tile);
        for (int r = 0; r < to.rows; ++r) {
            std::memcpy(to.data[r], static_cast<const uint8_t*>(from) + r * stride,
                        size_t(to.bytes));
        }
    }
    template <int tile>
    static void store(void* to, int64_t stride) {
        const Tile& from = at(tile);
        for (int r = 0; r < from.rows; ++r) {
            std::memcpy(static_cast<uint8_t*>(to) + r * stride, from.data[r], size_t(from.bytes));
        }
    }

    // tdpbssd: products of four pairs of bytes are added at a time.
    template <int sums, int a, int b>
    static void dot_int8() {
        multiply(sums, a, b, [](uint8_t* sum, const uint8_t* x, const uint8_t* y, int64_t steps) {
            int32_t total;
            std::memcpy(&total, sum, 4);
            for (int64_t k = 0; k < steps; ++k) {
                for (int i = 0; i < 4; ++i) total += int8_t(x[4 * k + i]) * int8_t(y[64 * k + i]);
            }
            std::memcpy(sum, &total, 4);
        });
    }
    // tdpbf16ps: even and odd inputs are added up apart from the sum, without another rounding
    // within a multiply-add; subnormal numbers are zero.
    template <int sums, int a, int b>
    static void dot_bfloat16() {
        multiply(sums, a, b, [](uint8_t* sum, const uint8_t* x, const uint8_t* y, int64_t steps) {
            float parts[2] = {0.0f, 0.0f}, total;
            for (int64_t k = 0; k < steps; ++k) {
                for (int i = 0; i < 2; ++i) {
                    bfloat16 one, other;
                    std::memcpy(&one, x + 4 * k + 2 * i, 2);
                    std::memcpy(&other, y + 64 * k + 2 * i, 2);
                    parts[i] = flushed(
                        std::fma(flushed(to_float(one)), flushed(to_float(other)), parts[i]));
                }
            }
            std::memcpy(&total, sum, 4);
            total = flushed(flushed(total) + flushed(parts[0] + parts[1]));
            std::memcpy(sum, &total, 4);
        });
    }

private:
    struct Tile {
        int rows, bytes;
        uint8_t data[16][64];
    };

    static Tile& at(int tile) {
        testing::expect(configured && tiles[tile].rows > 0, "a tile that is not configured");
        return tiles[tile];
    }

    static float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f * x : x; }

    // add(sum, row of a, column of b, words) for each word of the sums.
    template <typename Add>
    static void multiply(int sums, int a, int b, Add add) {
        Tile &to = at(sums), &left = at(a), &right = at(b);
        testing::expect(sums != a && sums != b && a != b, "a tile is used twice");
        testing::expect(to.rows == left.rows && to.bytes == right.bytes &&
                            left.bytes == 4 * right.rows && to.bytes % 4 == 0,
                        "shapes of tiles do not fit");
        for (int r = 0; r < to.rows; ++r) {
            for (int c = 0; c < to.bytes; c += 4) {
                add(to.data[r] + c, left.data[r], right.data[0] + c, right.rows);
            }
        }
    }

    static inline thread_local Tile tiles[8];
    static inline thread_local bool configured = false;
};

}  // namespace gpt2fast::GPT2FAST_ISA
