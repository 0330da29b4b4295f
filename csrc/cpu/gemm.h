// Products of packed weights with a few rows or many, which packed_rows.h has packed.
//
// A panel of 32 columns times a tile of rows keeps its sums in registers; the weights of a few rows
// pass through once, in the order in which they lie in memory, and those of many, which are near by
// then, once for each half of the sums if they do not fit.
//
// Floor of a product with one row: the panel's bytes at the speed of memory. With many rows: the
// multiply-adds, against R broadcasts and 32 / width loads a unit.
//
// A row has the same bits in every tile of an instruction set, alone or among others, since each of
// its sums is one chain over the inputs; those of quantized weights, whose groups are integers, in
// every instruction set with fused multiply-adds. A single row of floats would wait for its chains,
// 32 / width of them: it meets two panels at once, which are as many more.
#pragma once

#include "packed_rows.h"
#include "prefetch.h"

namespace gpt2fast::GPT2FAST_ISA {

// Sums of R rows and C vectors of columns.
template <int R, int C>
struct Sums {
    Vec v[R][C];

    void clear() {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) v[r][c] = Vec(0.0f);
        }
    }
    // From and to rows of a panel's columns.
    void load(const float* from) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) {
                v[r][c] = Vec::load(from + r * panel_columns + c * Vec::width);
            }
        }
    }
    void store(float* out) const {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) v[r][c].store(out + r * panel_columns + c * Vec::width);
        }
    }
};

// Rows of float32 or bfloat16 words anywhere in memory: word k of row r is at
// data + r * row_stride + k * word_stride, in bytes.
struct Strided {
    const uint8_t* data;
    int64_t row_stride, word_stride;
};

// sums += a word of each column times a word of each row.
template <Format format, int R, int C>
inline void add_word(Sums<R, C>& sums, const uint8_t* panel, const Strided& rows) {
    Words w[C];
    for (int c = 0; c < C; ++c) w[c] = Words::load(panel + c * 4 * Vec::width);
    for (int r = 0; r < R; ++r) {
        const Words x = Words::broadcast(rows.data + r * rows.row_stride);
        for (int c = 0; c < C; ++c) {
            if constexpr (format == Format::float32) {
                sums.v[r][c] = dot_float32(sums.v[r][c], w[c], x);
            } else {
                sums.v[r][c] = dot_bfloat16(sums.v[r][c], w[c], x);
            }
        }
    }
}

// sums += the even or the odd inputs of a word of each column times a float of each row.
template <bool odd, int R, int C>
inline void add_halves(Sums<R, C>& sums, const uint8_t* panel, const float* x) {
    Vec w[C];
    for (int c = 0; c < C; ++c) {
        const Words both = Words::load(panel + c * 4 * Vec::width);
        w[c] = odd ? odd_halves(both) : even_halves(both);
    }
    for (int r = 0; r < R; ++r) {
        const Vec factor(x[r]);
        for (int c = 0; c < C; ++c) sums.v[r][c] = fma(w[c], factor, sums.v[r][c]);
    }
}

// sums += an input of float16 weights times a float of each row.
template <int R, int C>
inline void add_float16(Sums<R, C>& sums, const uint8_t* panel, const float* x) {
    Vec wide[C];
    for (int c = 0; c < C; ++c) {
        wide[c] = Vec::load(reinterpret_cast<const float16*>(panel) + c * Vec::width);
    }
    for (int r = 0; r < R; ++r) {
        const Vec factor(x[r]);
        for (int c = 0; c < C; ++c) sums.v[r][c] = fma(wide[c], factor, sums.v[r][c]);
    }
}

// What 128 bytes of a panel of floats meet of each row: a word or, where weights are widened, two
// floats.
template <Format format>
constexpr int unit_words = format == Format::float16 || row_words(format) == 2 ? 2 : 1;

// sums += the inputs in 128 bytes of a panel times those of a tile.
template <Format format, int R, int C>
inline void add_unit(Sums<R, C>& sums, const uint8_t* panel, const uint8_t* tile) {
    const float* x = reinterpret_cast<const float*>(tile);
    if constexpr (format == Format::float16) {
        add_float16(sums, panel, x);
        add_float16(sums, panel + 2 * panel_columns, x + R);
    } else if constexpr (row_words(format) == 2) {
        add_halves<false>(sums, panel, x);
        add_halves<true>(sums, panel, x + R);
    } else {
        add_word<format>(sums, panel, {tile, 4, 0});
    }
}

// sums += panel * tile over `units` of 128 bytes. Of many rows one at a time: with two the compiler
// would spill sums.
template <Format format, int R, int C>
inline void add_units(Sums<R, C>& sums, const uint8_t* panel, const uint8_t* tile, int64_t units,
                      Ahead ahead) {
    for (int64_t k = 0; k < units; ++k) {
        ahead.ask();
        add_unit<format>(sums, panel, tile);
        panel += 4 * panel_columns;
        tile += 4 * R * unit_words<format>;
    }
}

// Calls part(column, ahead) for each part of a panel of so many bytes that is multiplied at once,
// `column` being its first one.
template <Format format, int R, typename Part>
inline void for_parts(const Ahead& ahead, int64_t panel_size, Part part) {
    constexpr int vectors = vectors_at_once(format, R), count = panel_vectors / vectors;
    for (int i = 0; i < count; ++i) {
        part(i * vectors * Vec::width, ahead.of_part(i, count, panel_size));
    }
}

// out (R, 32) = panel * rows over `words` words of inputs; with `add`, out is added to.
template <Format format, int R>
void multiply_floats(const uint8_t* panel, Strided rows, int64_t words, float* out, bool add) {
    for_parts<format, R>({}, 0, [&](int column, Ahead) {
        Sums<R, vectors_at_once(format, R)> sums;
        add ? sums.load(out + column) : sums.clear();
        const uint8_t* at = panel + 4 * column;
        Strided x = rows;
        for (int64_t k = 0; k < words; ++k) {
            add_word<format>(sums, at, x);
            at += 4 * panel_columns;
            x.data += x.word_stride;
        }
        sums.store(out + column);
    });
}

// Whether the sums of R rows need the registers that a loop around them would take for its own.
template <int R>
constexpr bool fills_registers = Vec::width == 8 && R > 1;

// Has x in memory here, so that the loops that follow need not spill what they add up.
template <typename T>
inline void leave_in_memory(T& x) {
    asm("" : "+m"(x));
}

// dots += the products of one group's weights and a tile's rows, as integers.
template <Format format, int R, int C, typename Prefetch>
inline void add_group(IntVec (&dots)[R][C], const uint8_t* panel, const uint8_t* tile, int words,
                      Prefetch& ahead) {
    if constexpr (format == Format::int8) {
        for (int k = 0; k < words; ++k) {
            ahead.ask();
            add_bytes(dots, panel, tile);
            panel += 4 * panel_columns;
            tile += 4 * R * row_words(Format::int8);
        }
    } else {
        for (int k = 0; k < words; k += 2 * nibble_words) {
            // Of a single row the low and the high halves are two chains of sums where those are
            // long.
            constexpr bool two_chains = R == 1 && multiplies_bytes;
            NibbleSums sums[R][C], others[R][C];
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) {
                    sums[r][c].begin(dots[r][c]);
                    others[r][c].begin(IntVec(0));
                }
            }
            if (fills_registers<R> && !multiplies_bytes) leave_in_memory(dots);
            for (int i = 0; i < nibble_words; ++i) {
                ahead.ask();
                Words low[C], high[C];
                for (int c = 0; c < C; ++c) {
                    const Words both = Words::load(panel + c * 4 * Vec::width);
                    low[c] = low_nibbles(both);
                    high[c] = high_nibbles(both);
                }
                for (int r = 0; r < R; ++r) {
                    const Words x = Words::broadcast(tile + 4 * r);
                    for (int c = 0; c < C; ++c) sums[r][c].add(low[c], x);
                }
                for (int r = 0; r < R; ++r) {
                    const Words x = Words::broadcast(tile + 4 * (R + r));
                    for (int c = 0; c < C; ++c) {
                        (two_chains ? others : sums)[r][c].add(high[c], x);
                    }
                }
                panel += 4 * panel_columns;
                tile += 8 * R;
            }
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) {
                    dots[r][c] = sums[r][c].end(dots[r][c]);
                    if (two_chains) dots[r][c] = dots[r][c] + others[r][c].end(IntVec(0));
                }
            }
        }
    }
}

// out (R, 32) = panel * tile for int8 and int4. The sums of a group are exact; its two scales are
// applied in float32.
template <Format format, int R>
void multiply_quantized(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows,
                        float* out, Ahead ahead) {
    constexpr int C = vectors_at_once(format, R);
    const int64_t groups = rows.padded_inputs / rows.group;
    const int words = int(rows.group) / 4;
    const int64_t tile_size = 4 * R * row_words(format) * words;
    const int64_t panel_size = panel_columns * (format == Format::int8 ? 4 : 2) * words;
    const uint8_t* after = tile + rows.words() * 4 * R;
    const float* x_scales = reinterpret_cast<const float*>(after);
    const int32_t* corrections = reinterpret_cast<const int32_t*>(after + groups * 4 * R);
    const auto multiply_part = [=](int column, auto asking) {
        const uint8_t* group = panel;
        Sums<R, C> sums;
        sums.clear();
        for (int64_t g = 0; g < groups; ++g) {
            if (fills_registers<R>) leave_in_memory(sums);
            const float16* w_scales = reinterpret_cast<const float16*>(group) + column;
            group += 2 * panel_columns;
            asking.template ask<panel_columns * 2 / 64>();
            IntVec dots[R][C];
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) dots[r][c] = IntVec(corrections[g * R + r]);
            }
            add_group<format>(dots, group + 4 * column, tile + g * tile_size, words, asking);
            group += panel_size;
            for (int c = 0; c < C; ++c) {
                const Vec scale = Vec::load(w_scales + c * Vec::width);
                for (int r = 0; r < R; ++r) {
                    sums.v[r][c] =
                        fma(dots[r][c].to_float(), scale * Vec(x_scales[g * R + r]), sums.v[r][c]);
                }
            }
        }
        sums.store(out + column);
    };
    for_parts<format, R>(ahead, groups * panel_size, [=](int column, Ahead asking) {
        if (fills_registers<R> && asking.far == nullptr) return multiply_part(column, NoPrefetch{});
        multiply_part(column, asking);
    });
}

// The same for a packed tile of R rows, whatever its format.
template <Format format, int R>
void multiply(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows, float* out,
              Ahead ahead) {
    if constexpr (is_quantized(format)) {
        multiply_quantized<format, R>(panel, tile, rows, out, ahead);
    } else {
        const int64_t units = rows.words() / unit_words<format>;
        for_parts<format, R>(ahead, units * 4 * panel_columns, [&](int column, Ahead asking) {
            Sums<R, vectors_at_once(format, R)> sums;
            sums.clear();
            const int begin = (format == Format::float16 ? 2 : 4) * column;
            add_units<format>(sums, panel + begin, tile, units, asking);
            sums.store(out + column);
        });
    }
}

// The products (2, 32) of one row with two panels that lie one behind the other, of floats: twice
// as many chains of sums, each in the order that it has alone. Each panel has an Ahead of its own.
template <Format format>
void multiply_pair(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows, float* out,
                   Ahead ahead, Ahead other_ahead) {
    const int64_t units = rows.words() / unit_words<format>;
    const uint8_t* other_panel = panel + units * 4 * panel_columns;
    Sums<1, panel_vectors> sums, others;
    sums.clear();
    others.clear();
    for (int64_t k = 0; k < units; ++k) {
        ahead.ask();
        other_ahead.ask();
        add_unit<format>(sums, panel, tile);
        add_unit<format>(others, other_panel, tile);
        panel += 4 * panel_columns;
        other_panel += 4 * panel_columns;
        tile += 4 * unit_words<format>;
    }
    sums.store(out);
    others.store(out + panel_columns);
}

using MultiplyFloats = void (*)(const uint8_t*, Strided, int64_t, float*, bool);
using Multiply = void (*)(const uint8_t*, const uint8_t*, const PackedRows&, float*, Ahead);

// The functions for 1 .. most_rows(format) rows.
template <Format format>
struct ByRows {
    template <int... R>
    static constexpr std::array<MultiplyFloats, sizeof...(R)> floats(
        std::integer_sequence<int, R...>) {
        return {multiply_floats<format, R + 1>...};
    }
    template <int... R>
    static constexpr std::array<Multiply, sizeof...(R)> packed(std::integer_sequence<int, R...>) {
        return {multiply<format, R + 1>...};
    }
    using Counts = std::make_integer_sequence<int, most_rows(format)>;
};

template <Format format>
MultiplyFloats multiply_floats_for(int rows) {
    static constexpr auto table = ByRows<format>::floats(typename ByRows<format>::Counts());
    return table[size_t(rows - 1)];
}

template <Format format>
Multiply multiply_for(int rows) {
    static constexpr auto table = ByRows<format>::packed(typename ByRows<format>::Counts());
    return table[size_t(rows - 1)];
}

// out (end, 32) = panel * rows for the rows from `begin` to `end`; with `add`, out is added to.
template <Format format>
void multiply_rows(const uint8_t* panel, const Strided& rows, int64_t begin, int64_t end,
                   int64_t words, float* out, bool add) {
    const Tiles tiles(format, end - begin);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t row = begin + tiles.begin(tile);
        multiply_floats_for<format>(tiles.size(tile))(
            panel, {rows.data + row * rows.row_stride, rows.row_stride, rows.word_stride}, words,
            out + row * panel_columns, add);
    }
}

inline Multiply multiply_for(Format format, int rows) {
    switch (format) {
        case Format::float32: return multiply_for<Format::float32>(rows);
        case Format::bfloat16: return multiply_for<Format::bfloat16>(rows);
        case Format::float16: return multiply_for<Format::float16>(rows);
        case Format::int8: return multiply_for<Format::int8>(rows);
        default: return multiply_for<Format::int4>(rows);
    }
}

using MultiplyPair = void (*)(const uint8_t*, const uint8_t*, const PackedRows&, float*, Ahead,
                              Ahead);

// The function for formats that are not quantized.
inline MultiplyPair multiply_pair_for(Format format) {
    if (format == Format::float32) return multiply_pair<Format::float32>;
    if (format == Format::bfloat16) return multiply_pair<Format::bfloat16>;
    return multiply_pair<Format::float16>;
}

// Row `column` of the transposed matrix, as floats: an embedding.
inline void unpack_column(const PackedMatrix& w, const uint8_t* data, int64_t column, float* out) {
    const uint8_t* panel = data + column / panel_columns * w.panel_size;
    const int64_t lane = column % panel_columns;
    switch (w.format) {
        case Format::float32:
            for (int64_t k = 0; k < w.inputs; ++k) {
                std::memcpy(out + k, panel + 4 * (k * panel_columns + lane), 4);
            }
            return;
        case Format::bfloat16:
            for (int64_t k = 0; k < w.inputs; ++k) {
                bfloat16 x;
                std::memcpy(&x, panel + 4 * (k / 2 * panel_columns + lane) + 2 * (k % 2), 2);
                out[k] = to_float(x);
            }
            return;
        case Format::float16:
            for (int64_t k = 0; k < w.inputs; ++k) {
                float16 x;
                std::memcpy(&x, panel + 2 * (k * panel_columns + lane), 2);
                out[k] = to_float(x);
            }
            return;
        default: break;
    }
    const bool bytes = w.format == Format::int8;
    const int64_t group_size = 2 * panel_columns + w.group * panel_columns / (bytes ? 1 : 2);
    for (int64_t k = 0; k < w.inputs; ++k) {
        const uint8_t* group = panel + k / w.group * group_size;
        const int64_t i = k % w.group;
        float16 scale;
        std::memcpy(&scale, group + 2 * lane, 2);
        const uint8_t* words = group + 2 * panel_columns;
        int q;
        if (bytes) {
            q = words[4 * (i / 4 * panel_columns + lane) + i % 4] - 128;
        } else {
            const uint8_t both = words[4 * (i / 8 * panel_columns + lane) + i % 4];
            q = (i % 8 < 4 ? both & 15 : both >> 4) - 8;
        }
        out[k] = to_float(scale) * float(q);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
