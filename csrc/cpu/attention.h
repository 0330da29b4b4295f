// Attention without a T x T matrix (Dao et al., 2022; Milakov & Gimelshein, 2018).
//
// A block of 32 queries lies across the vectors: their scores with a key are one row of a panel,
// maxima and sums over keys are elementwise, and the weights come out as the panel that the
// product with the values wants. Keys and values are read where they lie, a word at a time for all
// queries, so that nothing is transposed but the queries and the result.
//
// For T queries and keys of head size D: 2 T^2 D multiply-adds a head with the masked half skipped
// but for the diagonal's blocks, T^2 / 2 exponentials; twice as many where it is not causal. Keys
// and values that several query heads share are unpacked once for all of them.
#pragma once

#include "attention_heads.h"
#include "gemm.h"
#include "rows.h"
#include "scratch.h"
#ifdef GPT2FAST_AMX
#include "amx.h"
#include "simd/amx.h"
#endif

namespace gpt2fast::GPT2FAST_ISA {

template <typename T>
constexpr Format format_of = std::is_same_v<T, float> ? Format::float32 : Format::bfloat16;

// Keys whose scores are held at once.
#ifdef GPT2FAST_AMX
constexpr int key_block = 4 * tile_rows;
#else
constexpr int key_block = 56;
#endif

// Floats of scratch that attend_block needs.
inline int64_t attention_scratch(int64_t head_dim) {
    const int64_t panel = head_dim * panel_columns;  // queries, and as much for the sums
    return 2 * panel + key_block * panel_columns + key_block * head_dim;
}

// The type in which products over values stored as T are computed: bfloat16 where the processor
// multiplies it, else float32.
#ifdef GPT2FAST_AVX512_BF16
template <typename T>
using Factor = T;
#else
template <typename T>
using Factor = float;
#endif

// One entry as words: [input / u][u].
template <Format format, typename T>
void pack_entry(const T* x, int size, uint32_t* words) {
    if constexpr (format == Format::bfloat16) {
        if (size % 2) words[size / 2] = 0;
        std::memcpy(words, x, size_t(size) * sizeof(T));
    } else {
        float* floats = reinterpret_cast<float*>(words);
        for_columns(
            size, [&](int64_t j, auto step, auto) { store(load(x + j, step), floats + j, step); });
    }
}

// Words of the queries' panel: [input / u][32][u], queries past the last being zero.
template <typename T, typename Q>
void pack_queries(const Q* q, int64_t stride, int queries, int head_dim, uint32_t* panel) {
    constexpr int u = inputs_per_word(format_of<T>);
    constexpr int width = Vec::width;
    const int words = (head_dim + u - 1) / u;
    for (int k = 0; k < words; k += width) {
        const int n = std::min(width, words - k);
        for (int begin = 0; begin < panel_columns; begin += width) {
            Vec rows[width];
            for (int r = 0; r < width; ++r) {
                uint32_t row[width] = {};
                if (begin + r >= queries) {
                    rows[r] = Vec(0.0f);
                    continue;
                }
                const Q* from = q + (begin + r) * stride + k * u;
                const int size = std::min(n * u, head_dim - k * u);
                if constexpr (std::is_same_v<T, bfloat16> && !std::is_same_v<Q, bfloat16>) {
                    bfloat16 narrow[width * u] = {};
                    for_columns(size, [&](int64_t j, auto step, auto) {
                        store(load(from + j, step), narrow + j, step);
                    });
                    std::memcpy(row, narrow, sizeof row);
                } else {
                    pack_entry<format_of<T>>(from, size, row);
                }
                rows[r] = Vec::load(reinterpret_cast<const float*>(row));
            }
            transpose(rows);
            for (int c = 0; c < n; ++c) {
                rows[c].store(reinterpret_cast<float*>(panel) + (k + c) * panel_columns + begin);
            }
        }
    }
}

// The first of `rows` entries, or with two inputs to a word the first two: [input][u].
template <Format format, typename T>
void pack_pairs(const T* x, int64_t stride, int64_t rows, int size, uint32_t* words) {
    if constexpr (format == Format::bfloat16) {
        if (rows > 1) {
            const T* odd = x + stride;
            for (int d = 0; d < size; ++d) words[d] = x[d].bits | uint32_t(odd[d].bits) << 16;
        } else {
            for (int d = 0; d < size; ++d) words[d] = x[d].bits;
        }
    } else {
        pack_entry<format>(x, size, words);
    }
}

// Masks of attention weights, and dropout.
struct Weighting {
    bool causal = true;                // queries see no keys behind them
    const uint8_t* visible = nullptr;  // by key, or null: all of them
    float dropout = 0.0f;              // probability
    uint64_t seed = 0;
    uint32_t head = 0;  // counts through all heads of the batch
};

// Factors by which dropout multiplies the weights of 32 queries from `first` on, for four keys from
// `key` on, a multiple of 4: 0, or 1 / (1 - p). Philox 4x32-10 (Salmon et al., 2011) with the
// counter (key / 4, query, head, 0): a function of the seed and the weight's place alone.
inline void dropout_factors(const Weighting& weighting, int64_t first, int64_t key,
                            float* factors) {
    constexpr int n = panel_columns;
    uint32_t c0[n], c1[n], c2[n], c3[n];
    for (int i = 0; i < n; ++i) {
        c0[i] = uint32_t(key / 4);
        c1[i] = uint32_t(first) + uint32_t(i);
        c2[i] = weighting.head;
        c3[i] = 0;
    }
    uint32_t low = uint32_t(weighting.seed), high = uint32_t(weighting.seed >> 32);
    for (int round = 0; round < philox_rounds; ++round) {
        for (int i = 0; i < n; ++i) {
            const uint64_t x = uint64_t(philox_multiplier_0) * c0[i];
            const uint64_t y = uint64_t(philox_multiplier_2) * c2[i];
            c0[i] = uint32_t(y >> 32) ^ c1[i] ^ low;
            c2[i] = uint32_t(x >> 32) ^ c3[i] ^ high;
            c1[i] = uint32_t(y);
            c3[i] = uint32_t(x);
        }
        low += philox_key_step_low;
        high += philox_key_step_high;
    }
    const float kept = 1.0f / (1.0f - weighting.dropout);
    const uint32_t* words[] = {c0, c1, c2, c3};
    for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < n; ++i) {
            const float uniform = float(int32_t(words[r][i] >> 8)) * 0x1p-24f;
            factors[r * n + i] = uniform < weighting.dropout ? 0.0f : kept;
        }
    }
}

// The index of a query in its block, for each vector of a panel's row.
struct Lanes {
    Vec v[panel_vectors];

    Lanes() {
        for (int c = 0; c < panel_vectors; ++c) {
            float index[Vec::width];
            for (int i = 0; i < Vec::width; ++i) index[i] = float(c * Vec::width + i);
            v[c] = Vec::load(index);
        }
    }
};

// The scores of a block of queries, from `first` on, with one key; those that are hidden are -inf.
inline Vec visible_scores(Vec scores, const Lanes& lanes, int c, int64_t first, int64_t key,
                          const Weighting& weighting) {
    const Vec hidden(-std::numeric_limits<float>::infinity());
    if (weighting.visible != nullptr && !weighting.visible[key]) return hidden;
    if (!weighting.causal || key <= first) return scores;
    return select(lanes.v[c] < Vec(float(key - first)), hidden, scores);
}

// Rows of weights (keys, 32) as words, in place: in bfloat16 pairs of neighboring keys share one.
template <Format format>
void pack_weights(float* weights, int keys) {
    if constexpr (format == Format::bfloat16) {
        for (int j = 0; j < (keys + 1) / 2; ++j) {
            bfloat16 low[panel_columns], high[panel_columns] = {};
            for (int c = 0; c < panel_vectors; ++c) {
                const float* row = weights + 2 * j * panel_columns + c * Vec::width;
                Vec::load(row).store(low + c * Vec::width);
                if (2 * j + 1 < keys) Vec::load(row + panel_columns).store(high + c * Vec::width);
            }
            // Row j of pairs lies before row 2j of weights, which was read just now.
            uint32_t* packed = reinterpret_cast<uint32_t*>(weights) + j * panel_columns;
            for (int i = 0; i < panel_columns; ++i) {
                packed[i] = low[i].bits | uint32_t(high[i].bits) << 16;
            }
        }
    }
}

// scores (keys, 32) of the queries in `panel`.
template <Format format>
void multiply_keys(const uint32_t* panel, int words, Strided keys, int count, float* scores) {
    const uint8_t* queries = reinterpret_cast<const uint8_t*>(panel);
    int64_t done = 0;
#ifdef GPT2FAST_AMX
    if constexpr (format == Format::bfloat16) {
        if (words % tile_rows == 0 && keys.word_stride == 4) {
            const int tiles = count / tile_rows;
            tiled_scores<Amx>(queries, keys.data, keys.row_stride, tiles, words / tile_rows,
                              scores);
            done = tiles * tile_rows;
            if (done == count) return;
        }
    }
#endif
    multiply_rows<format>(queries, keys, done, count, words, scores, false);
}

// sums (head_dim, 32) += the values of `count` keys by `weights`, which pack_weights packed.
template <Format format>
void add_values(float* weights, Strided values, int count, int head_dim, float* sums) {
    const int u = inputs_per_word(format), words = (count + u - 1) / u;
    int64_t done = 0;
#ifdef GPT2FAST_AMX
    if constexpr (format == Format::bfloat16) {
        const int tiles = head_dim / tile_rows;
        add_tiled_values<Amx>(reinterpret_cast<uint32_t*>(weights),
                              reinterpret_cast<const uint32_t*>(values.data), words,
                              values.word_stride / 4, tiles, sums);
        done = tiles * tile_rows;
        if (done == head_dim) return;
    }
#endif
    multiply_rows<format>(reinterpret_cast<const uint8_t*>(weights), values, done, head_dim, words,
                          sums, true);
}

// Attention of `queries` <= 32 queries, from `first` on, packed in `panel`, to `entries` entries;
// if it is causal, of query i to entries 0 .. first + i. keys(begin) gives the words of the keys
// from `begin` on, values(begin, count) those of the values with the columns as rows and the
// entries as inputs. `sums` (head_dim, 32) receives the weighted values, `inverse` (32) what they
// have to be multiplied with, `lse` (32) the logarithm of the sum of the exponentials of the
// scores. A query that sees nothing has an inverse of 0 and an lse of infinity. `scores` is scratch
// for key_block rows of 32, twice as many with dropout.
template <Format format, typename Keys, typename Values>
void attend_panel(const uint32_t* panel, int words, int queries, int64_t first, int64_t entries,
                  Keys keys_from, Values values_of, int head_dim, float scale,
                  const Weighting& weighting, float* scores, float* sums, float* inverse,
                  float* lse) {
    constexpr int vectors = panel_vectors;
    std::memset(sums, 0, size_t(head_dim) * panel_columns * sizeof(float));
    const Lanes lanes;
    Vec largest[vectors], total[vectors];
    for (int c = 0; c < vectors; ++c) {
        // Finite, so that where all scores are -inf their distance from it is a number.
        largest[c] = Vec(std::numeric_limits<float>::lowest());
        total[c] = Vec(0.0f);
    }
    for (int64_t begin = 0; begin < entries; begin += key_block) {
        const int keys = int(std::min<int64_t>(key_block, entries - begin));
        const Strided key_words = keys_from(begin);
        multiply_keys<format>(panel, words, key_words, keys, scores);
        for (int c = 0; c < vectors; ++c) {
            const Vec before = largest[c];
            for (int j = 0; j < keys; ++j) {
                float* row = scores + j * panel_columns + c * Vec::width;
                const Vec score = visible_scores(Vec::load(row) * Vec(scale), lanes, c, first,
                                                 begin + j, weighting);
                score.store(row);
                largest[c] = max(largest[c], score);
            }
            Vec sum(0.0f);
            for (int j = 0; j < keys; ++j) {
                float* row = scores + j * panel_columns + c * Vec::width;
                const Vec weight = exp(Vec::load(row) - largest[c]);
                weight.store(row);
                sum = sum + weight;
            }
            const Vec kept = exp(before - largest[c]);
            total[c] = fma(total[c], kept, sum);
            if (begin > 0) {
                for (int d = 0; d < head_dim; ++d) {
                    float* row = sums + d * panel_columns + c * Vec::width;
                    (Vec::load(row) * kept).store(row);
                }
            }
        }
        if (weighting.dropout > 0.0f) {
            float* factors = scores + key_block * panel_columns;
            for (int j = 0; j < keys; j += 4) {
                dropout_factors(weighting, first, begin + j, factors + j * panel_columns);
            }
            for (int i = 0; i < keys * panel_columns; i += Vec::width) {
                (Vec::load(scores + i) * Vec::load(factors + i)).store(scores + i);
            }
        }
        pack_weights<format>(scores, keys);
        const Strided values = values_of(begin, keys);
        add_values<format>(scores, values, keys, head_dim, sums);
    }
    for (int c = 0; c < vectors; ++c) {
        const Vec none(0.0f);
        select(none < total[c], Vec(1.0f) / total[c], total[c]).store(inverse + c * Vec::width);
        largest[c].store(lse + c * Vec::width);
    }
    for (int i = 0; i < queries; ++i) lse[i] -= std::log(inverse[i]);
}

// out[i, d] = sums[d, i] * inverse[i].
template <typename O>
void write_queries(const float* sums, const float* inverse, int queries, int head_dim, O* out,
                   int64_t out_stride) {
    constexpr int width = Vec::width;
    for (int begin = 0; begin < queries; begin += width) {
        const Vec factor = Vec::load(inverse + begin);
        for (int d = 0; d < head_dim; d += width) {
            const int n = std::min(width, head_dim - d);
            Vec rows[width];
            for (int c = 0; c < width; ++c) {
                rows[c] =
                    c < n ? Vec::load(sums + (d + c) * panel_columns + begin) * factor : Vec(0.0f);
            }
            transpose(rows);
            for (int r = 0; r < std::min(width, queries - begin); ++r) {
                O* to = out + (begin + r) * out_stride + d;
                n == width ? rows[r].store(to) : rows[r].store(to, n);
            }
        }
    }
}

// Attention of `queries` <= 32 consecutive queries of one head; query i sees entries 0 ..
// first + i. `out` receives a row of head_dim for each, `lse` (may be null) the logarithm of the
// sum of the exponentials of its scores. Keys are read in whole words: one of an odd number of
// bfloat16 is followed by a finite one.
template <typename T, typename Q, typename O>
void attend_block(const Q* q, int64_t q_stride, int queries, int64_t first, Entries<T> k,
                  Entries<T> v, int head_dim, float scale, float* scratch, O* out,
                  int64_t out_stride, float* lse) {
    constexpr Format format = format_of<T>;
    constexpr int u = inputs_per_word(format);
    uint32_t* panel = reinterpret_cast<uint32_t*>(scratch);
    float* sums = scratch + head_dim * panel_columns;
    float* scores = sums + head_dim * panel_columns;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scores + key_block * panel_columns);
    pack_queries<T>(q, q_stride, queries, head_dim, panel);
#ifdef GPT2FAST_AMX
    if constexpr (format == Format::bfloat16) Amx::configure(tile_config(tile_bytes));
#endif
    const auto keys = [&](int64_t begin) {
        return Strided{reinterpret_cast<const uint8_t*>(k.data + begin * k.stride),
                       k.stride * int64_t(sizeof(T)), 4};
    };
    const auto values = [&](int64_t begin, int count) {
        if constexpr (format == Format::float32) {
            return Strided{reinterpret_cast<const uint8_t*>(v.data + begin * v.stride), 4,
                           v.stride * int64_t(sizeof(T))};
        } else {
            for (int j = 0; j < count; j += u) {
                pack_pairs<format>(v.data + (begin + j) * v.stride, v.stride, count - j, head_dim,
                                   pairs + j / u * head_dim);
            }
            return Strided{reinterpret_cast<const uint8_t*>(pairs), 4, 4 * int64_t(head_dim)};
        }
    };
    alignas(64) float inverse[panel_columns], logarithms[panel_columns];
    attend_panel<format>(panel, (head_dim + u - 1) / u, queries, first, first + queries, keys,
                         values, head_dim, scale, {}, scores, sums, inverse, logarithms);
#ifdef GPT2FAST_AMX
    if constexpr (format == Format::bfloat16) Amx::release();
#endif
    write_queries(sums, inverse, queries, head_dim, out, out_stride);
    if (lse != nullptr) std::memcpy(lse, logarithms, size_t(queries) * sizeof(float));
}

// Entries [begin, end) of one head at [entry][input / u][u], and, if asked for, at
// [entry / u][input][u]. `begin` is a multiple of u.
template <Format format, typename T>
void pack_entries(Entries<T> x, int64_t begin, int64_t end, int size, uint32_t* along,
                  uint32_t* across) {
    constexpr int u = inputs_per_word(format);
    const int words = (size + u - 1) / u;
    for (int64_t t = begin; t < end; ++t) {
        if (along != nullptr) pack_entry<format>(x.data + t * x.stride, size, along + t * words);
        if (across != nullptr && t % u == 0) {
            pack_pairs<format>(x.data + t * x.stride, x.stride, end - t, size,
                               across + t / u * size);
        }
    }
}

template <typename T>
Entries<T> head_of(const Heads<const void>& x, int64_t row, int64_t head) {
    return {x.as<const T>().at(row, 0, head), x.entry_stride};
}

inline Weighting weighting_of(const Attention& args, int64_t row, int64_t head) {
    const uint8_t* visible = args.visible == nullptr ? nullptr : args.visible + row * args.time;
    return {args.causal, visible, args.dropout, args.seed, uint32_t(row * args.heads + head)};
}

// The entries that some of `queries` queries from `first` on may see.
inline int64_t entries_of(const Attention& args, int64_t first, int queries) {
    return args.causal ? first + queries : args.time;
}

// Keys and values of a key head are packed as far as its queries' blocks get, once for all blocks
// of the range and all heads that share it.
template <typename T>
void attention_blocks(const Attention& args, int64_t begin, int64_t end) {
    constexpr Format format = format_of<Factor<T>>;
    constexpr int u = inputs_per_word(format);
    const int size = int(args.head_dim);
    const int words = (size + u - 1) / u;
    const int64_t pairs = (args.time + u - 1) / u;
    const int64_t blocks = (args.time + panel_columns - 1) / panel_columns;
    const int64_t weights = 2 * key_block * panel_columns;
    Scratch scratch(Scratch::size(args.time * words) + Scratch::size(pairs * size) +
                    (words + size) * panel_columns + weights);
    auto* keys = reinterpret_cast<uint32_t*>(scratch.take(args.time * words));
    auto* values = reinterpret_cast<uint32_t*>(scratch.take(pairs * size));
    auto* panel = reinterpret_cast<uint32_t*>(scratch.take(words * panel_columns));
    float* sums = scratch.take(size * panel_columns);
    float* scores = scratch.take(weights);
    int64_t packed = 0, packed_head = -1;  // entries, of a head among those of all rows
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / blocks / args.heads, head = item / blocks % args.heads;
        const int64_t first = item % blocks * panel_columns;
        const int queries = int(std::min<int64_t>(panel_columns, args.time - first));
        const int64_t entries = entries_of(args, first, queries), key_head = head / args.group();
        if (packed_head != row * args.key_heads + key_head) {
            packed_head = row * args.key_heads + key_head;
            packed = 0;
        }
        pack_entries<format>(head_of<T>(args.k, row, key_head), packed, entries, size, keys,
                             nullptr);
        pack_entries<format>(head_of<T>(args.v, row, key_head), packed, entries, size, nullptr,
                             values);
        packed = std::max(packed, entries);
        const Entries<T> q = head_of<T>(args.q, row, head);
        pack_queries<Factor<T>>(q.data + first * q.stride, q.stride, queries, size, panel);
        alignas(64) float inverse[panel_columns], lse[panel_columns];
        attend_panel<format>(
            panel, words, queries, first, entries,
            [&](int64_t key) {
                return Strided{reinterpret_cast<const uint8_t*>(keys + key * words), 4 * words, 4};
            },
            [&](int64_t key, int) {
                return Strided{reinterpret_cast<const uint8_t*>(values + key / u * size), 4,
                               4 * size};
            },
            size, args.scale, weighting_of(args, row, head), scores, sums, inverse, lse);
        T* out = static_cast<T*>(args.out) + ((row * args.time + first) * args.heads + head) * size;
        write_queries(sums, inverse, queries, size, out, args.heads * size);
        std::memcpy(args.lse + (row * args.heads + head) * args.time + first, lse,
                    size_t(queries) * sizeof(float));
    }
}

inline void attention(const Attention& args, int64_t begin, int64_t end) {
    static_assert(panel_columns == attention_queries);
    with_type(args.dtype, [&](auto* type) {
        attention_blocks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
