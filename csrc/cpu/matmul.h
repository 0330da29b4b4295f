// Products of two matrices as training needs them: out = a b + bias, each of a and b a view whose
// rows or whose columns are contiguous, so that one kernel serves x w, grad w^T and x^T grad.
//
// The rows of a are packed once, as tiles of packed_rows.h; then each item packs some panels
// of b into the core's own cache and takes them past all tiles. What is packed may be float32 where
// bfloat16 is multiplied: it is rounded on the way, so that weights need no copy in bfloat16.
//
// For a (M, K) and b (K, N): 2 M N K operations at the rate of the microkernels, which is that of
// the processor (a tile of 14 rows needs 28 multiply-adds for 2 loads and 14 broadcasts); packing
// costs about as much as one or two tiles of rows for each panel, and one column of panels for a.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace gpt2fast::GPT2FAST_ISA {

// Panels that an item takes past a tile while that is near; together they take half of a core's
// own cache, or one does.
constexpr int64_t most_panels = 4, most_panel_bytes = 1 << 19;

constexpr int64_t matmul_alignment = 64;

inline int64_t words_of(Format format, int64_t inputs) {
    return (inputs + inputs_per_word(format) - 1) / inputs_per_word(format);
}

// `width` words of a line (a row of a, a column of b) whose elements are contiguous: float32 as it
// is, bfloat16 in pairs. `count` elements are there, the others are zero.
inline Vec line_words(const float* x, Format format, int64_t count) {
    constexpr int width = Vec::width;
    if (format == Format::float32) {
        return count >= width ? Vec::load(x) : Vec::load(x, int(count));
    }
    bfloat16 pairs[2 * width];
    if (count >= 2 * width) {
        Vec::load(x).store(pairs);
        Vec::load(x + width).store(pairs + width);
    } else {
        for (int i = 0; i < 2 * width; ++i) pairs[i] = to_bfloat16(i < count ? x[i] : 0.0f);
    }
    Vec words;
    std::memcpy(&words, pairs, sizeof words);
    return words;
}

inline Vec line_words(const bfloat16* x, Format, int64_t count) {
    bfloat16 pairs[2 * Vec::width] = {};
    Vec words;
    if (count >= 2 * Vec::width) {
        std::memcpy(&words, x, sizeof words);
        return words;
    }
    std::memcpy(pairs, x, size_t(count) * sizeof(bfloat16));
    std::memcpy(&words, pairs, sizeof words);
    return words;
}

// Lines [0, lines) of at most `room` as columns of words: word k of line l goes to
// to[k * room + l]. `room` is the rows of a tile or a panel's columns; the lines that are missing
// in a panel are zero.
template <typename T>
void pack_lines(const T* from, int64_t line_stride, int64_t inputs, Format format, int lines,
                int room, float* to) {
    constexpr int width = Vec::width;
    const int64_t words = words_of(format, inputs), per_word = inputs_per_word(format);
    for (int first = 0; first < room; first += width) {
        const int here = std::min(width, room - first);
        for (int64_t k = 0; k < words; k += width) {
            Vec block[width];
            for (int l = 0; l < width && first + l < lines; ++l) {
                __builtin_prefetch(from + (first + l) * line_stride + (k + 8 * width) * per_word);
            }
            for (int l = 0; l < width; ++l) {
                const T* line = from + (first + l) * line_stride + k * per_word;
                block[l] =
                    first + l < lines ? line_words(line, format, inputs - k * per_word) : Vec(0.0f);
            }
            transpose(block);
            const int64_t there = std::min<int64_t>(width, words - k);
            for (int64_t i = 0; i < there; ++i) {
                float* at = to + (k + i) * room + first;
                // A whole vector writes past its word; the next one overwrites that. The last have
                // none to follow.
                if ((words - k - i) * room - first >= width) {
                    block[i].store(at);
                } else {
                    block[i].store(at, here);
                }
            }
        }
    }
}

// Two neighboring inputs of `width` lines, as words.
template <typename T>
Vec pair_words(const T* even, const T* odd, int lines) {
    constexpr int width = Vec::width;
    bfloat16 low[width] = {}, high[width] = {};
    const auto round = [&](const T* x, bfloat16* to) {
        if (lines < width) {
            Vec::load(x, lines).store(to);
        } else if constexpr (std::is_same<T, bfloat16>::value) {
            std::memcpy(to, x, sizeof low);
        } else {
            Vec::load(x).store(to);
        }
    };
    round(even, low);
    if (odd != nullptr) round(odd, high);
    uint32_t pairs[width];
    for (int i = 0; i < width; ++i) pairs[i] = uint32_t(low[i].bits) | uint32_t(high[i].bits) << 16;
    Vec words;
    std::memcpy(&words, pairs, sizeof words);
    return words;
}

// The same as pack_lines where the lines' elements are `stride` apart and the lines neighbors, for
// words [begin, end) alone.
template <typename T>
void pack_across(const T* from, int64_t stride, int64_t inputs, Format format, int lines, int room,
                 float* to, int64_t begin, int64_t end) {
    constexpr int width = Vec::width;
    const int64_t words = words_of(format, inputs);
    for (int64_t k = begin; k < end; ++k) {
        for (int first = 0; first < room; first += width) {
            const int here = std::min(width, lines - first);
            float* at = to + k * room + first;
            Vec word(0.0f);
            if (here > 0 && format == Format::float32) {
                if constexpr (std::is_same<T, float>::value) {
                    const float* x = from + k * stride + first;
                    word = here == width ? Vec::load(x) : Vec::load(x, here);
                }
            } else if (here > 0) {
                const T* x = from + 2 * k * stride + first;
                word = pair_words(x, 2 * k + 1 < inputs ? x + stride : nullptr, here);
            }
            if ((words - k) * room - first >= width) {
                word.store(at);
            } else {
                word.store(at, std::min(width, room - first));
            }
        }
    }
}

// Packed together: `lines` lines of a view from line `first` on, in columns of `room`.
struct Pack {
    int64_t first;
    int lines, room;
    float* to;
};

template <typename T, typename Packs>
void pack_of(const View& view, int64_t inputs, Format format, int64_t begin, int64_t end,
             Packs packs) {
    const T* from = static_cast<const T*>(view.data);
    if (view.input_stride == 1) {
        for (int64_t i = begin; i < end; ++i) {
            const Pack pack = packs(i);
            pack_lines(from + pack.first * view.line_stride, view.line_stride, inputs, format,
                       pack.lines, pack.room, pack.to);
        }
        return;
    }
    // Neighbors in turns, so that each line of the cache, and each page, is asked for once.
    constexpr int64_t together = 8, block = 32;
    const int64_t words = words_of(format, inputs);
    const int64_t per_word = inputs_per_word(format);
    for (int64_t group = begin; group < end; group += together) {
        const int64_t last = std::min(end, group + together);
        const int64_t from_line = packs(group).first;
        const int64_t lines = packs(last - 1).first + packs(last - 1).lines - from_line;
        for (int64_t k = 0; k < words; k += block) {
            const int64_t next = (k + block) * per_word;
            for (int64_t i = next; i < std::min(inputs, next + block * per_word); ++i) {
                const T* row = from + from_line + i * view.input_stride;
                for (int64_t l = 0; l < lines; l += 64 / int64_t(sizeof(T))) {
                    __builtin_prefetch(row + l, 0, 2);
                }
            }
            for (int64_t i = group; i < last; ++i) {
                const Pack pack = packs(i);
                pack_across(from + pack.first, view.input_stride, inputs, format, pack.lines,
                            pack.room, pack.to, k, std::min(words, k + block));
            }
        }
    }
}

// Packs [begin, end), each as packs(number) says.
template <typename Packs>
void pack(const View& view, int64_t inputs, Format format, int64_t begin, int64_t end,
          Packs packs) {
    with_type(view.dtype, [&](auto* type) {
        pack_of<std::remove_pointer_t<decltype(type)>>(view, inputs, format, begin, end, packs);
    });
}

// Measured: faster with vectors of 16 floats and, for bfloat16, its dot-product instruction; not on
// processors with AMX, whose tiles torch uses, nor in float32 on Intel's, for which MKL is written.
// With vectors of 8, torch's float32 is as fast as the processor but where results are awkward, and
// bfloat16, which torch then widens, is no better.
inline bool matmul_pays(bool narrow, bool awkward) {
#ifdef __x86_64__
    const bool intel = __builtin_cpu_is("intel");
#else
    const bool intel = false;
#endif
    if (Vec::width == 8) return awkward && !intel;
    if (!narrow) return Vec::width == 16 && !intel;
#ifdef GPT2FAST_AVX512_BF16
    return !__builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

inline MatmulPlan matmul_plan(const Matmul& args, int threads) {
    const Tiles tiles(args.format, args.rows);
    const int64_t panels = (args.columns + panel_columns - 1) / panel_columns;
    const int64_t words = words_of(args.format, args.inputs);
    MatmulPlan best{};
    double least = 0.0;
    for (int64_t parts = 1; parts <= std::min<int64_t>(threads, tiles.count); ++parts) {
        const int64_t room = most_panel_bytes / (4 * panel_columns * std::max<int64_t>(1, words));
        for (int64_t at_once = std::min(most_panels, std::max<int64_t>(1, room)); at_once > 0;
             at_once /= 2) {
            const int64_t groups = (panels + at_once - 1) / at_once;
            // Packing a panel costs about as much as a tile and a half.
            const double item = double((panels + groups - 1) / groups) *
                                (double((tiles.count + parts - 1) / parts) + 1.5);
            const double whole = double((parts * groups + threads - 1) / threads) * item;
            if (best.parts == 0 || whole < 0.98 * least) {
                least = whole;
                best.parts = parts;
                best.groups = groups;
            }
        }
    }
    best.tiles = tiles.count;
    best.workspace = 4 * words * args.rows + matmul_alignment;
    return best;
}

// Packs tiles [begin, end) of a's rows.
inline void matmul_pack(const Matmul& args, int64_t begin, int64_t end) {
    const Tiles tiles(args.format, args.rows);
    const int64_t words = words_of(args.format, args.inputs);
    pack(args.a, args.inputs, args.format, begin, end, [&](int64_t tile) {
        const int64_t row = tiles.begin(tile);
        const int rows = tiles.size(tile);
        return Pack{row, rows, rows, args.packed + row * words};
    });
}

// Adds up the inputs of each of a panel's columns.
inline void sum_panel(const float* panel, int64_t words, Format format, float* sums) {
    constexpr int64_t block = 64;  // inputs that are summed before they are added to the total
    Vec total[panel_vectors];
    for (Vec& x : total) x = Vec(0.0f);
    for (int64_t begin = 0; begin < words; begin += block) {
        const int64_t end = std::min(words, begin + block);
        for (int c = 0; c < panel_vectors; ++c) {
            Vec sum(0.0f);
            for (int64_t k = begin; k < end; ++k) {
                const float* at = panel + k * panel_columns + c * Vec::width;
                if (format == Format::float32) {
                    sum = sum + Vec::load(at);
                } else {
                    const Words w = Words::load(at);
                    sum = sum + (even_halves(w) + odd_halves(w));
                }
            }
            total[c] = total[c] + sum;
        }
    }
    for (int c = 0; c < panel_vectors; ++c) total[c].store(sums + c * Vec::width);
}

// sums (R, 32) = panel * tile over `words` words of inputs.
template <Format format, int R>
void multiply_tile(const float* panel, const float* tile, int64_t words, float* sums) {
    multiply_floats<format, R>(reinterpret_cast<const uint8_t*>(panel),
                               {reinterpret_cast<const uint8_t*>(tile), 4, 4 * R}, words, sums,
                               false);
}

using MultiplyTile = void (*)(const float*, const float*, int64_t, float*);

template <Format format, int... R>
MultiplyTile multiply_tile_of(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyTile table[] = {multiply_tile<format, R + 1>...};
    return table[rows - 1];
}

inline MultiplyTile multiply_tile_for(Format format, int rows) {
    if (format == Format::float32) {
        using Counts = std::make_integer_sequence<int, most_rows(Format::float32)>;
        return multiply_tile_of<Format::float32>(rows, Counts());
    }
    using Counts = std::make_integer_sequence<int, most_rows(Format::bfloat16)>;
    return multiply_tile_of<Format::bfloat16>(rows, Counts());
}

// Prefetches the place of the result while its sums are computed.
inline void ask_for_rows(const Matmul& args, int64_t row, int rows, int64_t column) {
    const int64_t size = args.out_dtype == DType::float32 ? 4 : 2;
    for (int r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * args.out_stride + column;
        const char* out = static_cast<const char*>(args.out) + at * size;
        __builtin_prefetch(out, 1);
        if (size == 4) __builtin_prefetch(out + 64, 1);
    }
}

template <typename Out>
void finish_rows(const Matmul& args, const float* sums, int64_t row, int rows, int64_t column) {
    const int64_t columns = std::min<int64_t>(panel_columns, args.columns - column);
    for (int r = 0; r < rows; ++r) {
        Out* out = static_cast<Out*>(args.out) + (row + r) * args.out_stride + column;
        const float* before = args.before == nullptr
                                  ? nullptr
                                  : args.before + (row + r) * args.before_stride + column;
        const float* x = sums + r * panel_columns;
        const auto put = [&](int64_t j, auto step, auto) {
            Vec y = load(x + j, step);
            if (before != nullptr) y = y + load(before + j, step);
            if (args.bias != nullptr) y = y + load(args.bias + column + j, step);
            store(y, out + j, step);
        };
        for_columns(columns, put);
    }
}

// Memory for a thread's panels, kept for its next product.
inline float* panel_memory(int64_t floats) {
    struct Kept {
        float* data = nullptr;
        int64_t size = 0;
        ~Kept() { std::free(data); }
    };
    static thread_local Kept kept;
    if (kept.size < floats) {
        std::free(kept.data);
        kept.size = 0;
        kept.data = static_cast<float*>(std::aligned_alloc(64, size_t(floats + 15) / 16 * 64));
        if (kept.data == nullptr) throw std::bad_alloc();
        kept.size = floats;
    }
    return kept.data;
}

// Items [begin, end): a group of panels each, with one part of the rows.
inline void matmul(const Matmul& args, int64_t begin, int64_t end) {
    const MatmulPlan& plan = args.plan;
    const Tiles tiles(args.format, args.rows);
    const int64_t words = words_of(args.format, args.inputs);
    const int64_t panels = (args.columns + panel_columns - 1) / panel_columns;
    const int64_t panel_size = words * panel_columns;
    float* packed = panel_memory((panels + plan.groups - 1) / plan.groups * panel_size);
    alignas(64) float sums[14 * panel_columns];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item / plan.groups, group = item % plan.groups;
        const int64_t first = panels * group / plan.groups;
        const int64_t last = panels * (group + 1) / plan.groups;
        const auto columns_of = [&](int64_t p) {
            return int(std::min<int64_t>(panel_columns, args.columns - p * panel_columns));
        };
        pack(args.b, args.inputs, args.format, first, last, [&](int64_t p) {
            return Pack{p * panel_columns, columns_of(p), panel_columns,
                        packed + (p - first) * panel_size};
        });
        for (int64_t p = first; args.column_sums != nullptr && part == 0 && p < last; ++p) {
            float sum[panel_columns];
            sum_panel(packed + (p - first) * panel_size, words, args.format, sum);
            for (int j = 0; j < columns_of(p); ++j) {
                float& to = args.column_sums[p * panel_columns + j];
                to = args.add_to_sums ? to + sum[j] : sum[j];
            }
        }
        for (int64_t tile = tiles.count * part / plan.parts;
             tile < tiles.count * (part + 1) / plan.parts; ++tile) {
            const int64_t row = tiles.begin(tile);
            const int rows = tiles.size(tile);
            const float* lines = args.packed + row * words;
            const MultiplyTile multiply = multiply_tile_for(args.format, rows);
            for (int64_t p = first; p < last; ++p) {
                const float* panel = packed + (p - first) * panel_size;
                ask_for_rows(args, row, rows, p * panel_columns);
                multiply(panel, lines, words, sums);
                with_type(args.out_dtype, [&](auto* type) {
                    using Out = std::remove_pointer_t<decltype(type)>;
                    finish_rows<Out>(args, sums, row, rows, p * panel_columns);
                });
            }
        }
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
