// Cases for launch/cache.h.
#include "launch/cache.h"

#include <algorithm>

#include "heads.h"

namespace gpt2fast::simulated {
namespace {

// Keys and values are two parts of three; the caches lie `offset` elements behind aligned memory.
template <class From, class To>
void append(HeadsShape cache_shape, int64_t time, const std::vector<int64_t>& lengths,
            const std::vector<int64_t>& counts, int64_t offset = 0) {
    const std::string what = name_of<From>() + " to " + name_of<To>() + ", head size " +
                             std::to_string(cache_shape.head_dim) + ", offset " +
                             std::to_string(offset);
    Random random;
    HeadsShape shape = cache_shape;
    shape.entries = time;
    CacheMemory<From> packed(shape, 3);
    for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t step = 0; step < time; ++step) packed.fill(random, row, step);
    }
    CacheMemory<To> k_cache(cache_shape, 1, offset), v_cache(cache_shape, 1, offset);
    const Buffer<int64_t> length = integers(lengths), count = integers(counts);
    launch::AppendToCache args{};
    args.from[0] = packed.const_heads(1);
    args.from[1] = packed.const_heads(2);
    args.cache[0] = k_cache.heads(0);
    args.cache[1] = v_cache.heads(0);
    args.lengths = {length.data(), 1};
    if (!counts.empty()) args.counts = {count.data(), 1};
    args.batch = shape.rows;
    args.time = time;
    args.heads = shape.heads;
    args.head_dim = shape.head_dim;
    args.entries = cache_shape.entries;
    args.dtype = dtype_of<From>;
    args.cache_dtype = dtype_of<To>;
    launch::append_to_cache(args, nullptr);
    for (int part = 0; part < 2; ++part) {
        CacheMemory<To>& cache = part == 0 ? k_cache : v_cache;
        for (int64_t row = 0; row < shape.rows; ++row) {
            const int64_t begin = lengths[size_t(row)];
            const int64_t stored =
                counts.empty() ? time : std::clamp<int64_t>(counts[size_t(row)], 0, time);
            for (int64_t entry = 0; entry < cache_shape.entries; ++entry) {
                const bool is_new = entry >= begin && entry < begin + stored;
                for (int64_t head = 0; head < shape.heads; ++head) {
                    for (int64_t d = 0; d < shape.head_dim; ++d) {
                        const double value = to_double(cache.at(0, row, entry, head, d));
                        const std::string place = what + ": row " + std::to_string(row) +
                                                  ", entry " + std::to_string(entry) + ", head " +
                                                  std::to_string(head) + ", element " +
                                                  std::to_string(d);
                        if (!is_new) {
                            expect_unwritten(value, place);
                            continue;
                        }
                        const float given =
                            device::to_float(packed.at(1 + part, row, entry - begin, head, d));
                        expect_same(value, to_double(device::from_float<To>(given)), place);
                    }
                }
            }
        }
    }
}

// As `append`; entries of 8 bits are compared with csrc/cpu/decode.h's rounding.
template <class From>
void append_int8(HeadsShape cache_shape, int64_t time, const std::vector<int64_t>& lengths,
                 const std::vector<int64_t>& counts, int64_t offset = 0) {
    const std::string what = name_of<From>() + " to int8, head size " +
                             std::to_string(cache_shape.head_dim) + ", offset " +
                             std::to_string(offset);
    Random random;
    HeadsShape shape = cache_shape;
    shape.entries = time;
    CacheMemory<From> packed(shape, 3);
    for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t step = 0; step < time; ++step) packed.fill(random, row, step);
    }
    for (int64_t d = 0; d < shape.head_dim; ++d) {
        packed.at(1, 0, 0, 0, d) = device::from_float<From>(0.0f);
    }
    CacheMemory<int8_t> k_cache(cache_shape, 1, offset), v_cache(cache_shape, 1, offset);
    CacheMemory<float> k_scales = factors(cache_shape), v_scales = factors(cache_shape);
    const Buffer<int64_t> length = integers(lengths), count = integers(counts);
    launch::AppendToCache args{};
    args.from[0] = packed.const_heads(1);
    args.from[1] = packed.const_heads(2);
    args.cache[0] = k_cache.heads(0);
    args.cache[1] = v_cache.heads(0);
    args.scales[0] = k_scales.heads(0);
    args.scales[1] = v_scales.heads(0);
    args.lengths = {length.data(), 1};
    if (!counts.empty()) args.counts = {count.data(), 1};
    args.batch = shape.rows;
    args.time = time;
    args.heads = shape.heads;
    args.head_dim = shape.head_dim;
    args.entries = cache_shape.entries;
    args.dtype = dtype_of<From>;
    args.cache_dtype = dtype_of<int8_t>;
    launch::append_to_cache(args, nullptr);
    for (int part = 0; part < 2; ++part) {
        CacheMemory<int8_t>& cache = part == 0 ? k_cache : v_cache;
        CacheMemory<float>& scales = part == 0 ? k_scales : v_scales;
        for (int64_t row = 0; row < shape.rows; ++row) {
            const int64_t begin = lengths[size_t(row)];
            const int64_t stored =
                counts.empty() ? time : std::clamp<int64_t>(counts[size_t(row)], 0, time);
            for (int64_t entry = 0; entry < cache_shape.entries; ++entry) {
                for (int64_t head = 0; head < shape.heads; ++head) {
                    const float scale = scales.at(0, row, entry, head, 0);
                    const std::string place = what + ": row " + std::to_string(row) + ", entry " +
                                              std::to_string(entry) + ", head " +
                                              std::to_string(head);
                    if (entry < begin || entry >= begin + stored) {
                        expect_unwritten(scale, place + ", its factor");
                        for (int64_t d = 0; d < shape.head_dim; ++d) {
                            expect_same(cache.at(0, row, entry, head, d), -1,
                                        place + ", element " + std::to_string(d));
                        }
                        continue;
                    }
                    const auto given = [&](int64_t d) {
                        return device::to_float(packed.at(1 + part, row, entry - begin, head, d));
                    };
                    float most = 0.0f;
                    for (int64_t d = 0; d < shape.head_dim; ++d) {
                        most = std::max(most, std::fabs(given(d)));
                    }
                    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
                    expect_same(scale, most / 127.0f, place + ", its factor");
                    for (int64_t d = 0; d < shape.head_dim; ++d) {
                        expect_same(cache.at(0, row, entry, head, d),
                                    double(std::lrint(given(d) * inverse)),
                                    place + ", element " + std::to_string(d));
                    }
                }
            }
        }
    }
}

CASE("append_to_cache in 8 bits: ragged rows, odd and unaligned heads") {
    append_int8<bf16>({4, 16, 2, 64}, 7, {0, 3, 9, 15}, {7, 0, 3, -1});
    append_int8<float>({3, 300, 12, 64}, 1, {299, 0, 17}, {});
    append_int8<fp16>({2, 9, 3, 40}, 2, {1, 7}, {});
    append_int8<bf16>({2, 9, 3, 5}, 2, {1, 7}, {});
    append_int8<float>({2, 9, 3, 1}, 2, {1, 7}, {});
    append_int8<bf16>({1, 9, 1, 136}, 2, {1}, {});
    append_int8<bf16>({2, 9, 3, 64}, 2, {1, 7}, {}, 1);
}

CASE("append_to_cache in 8 bits from every dtype") {
    for (const int64_t head_dim : {16, 5}) {
        append_int8<float>({1, 3, 1, head_dim}, 1, {1}, {});
        append_int8<bf16>({1, 3, 1, head_dim}, 1, {1}, {});
        append_int8<fp16>({1, 3, 1, head_dim}, 1, {1}, {});
    }
}

CASE("append_to_cache, ragged rows and counts") {
    append<bf16, bf16>({4, 16, 2, 64}, 7, {0, 3, 9, 5}, {});
    append<bf16, bf16>({4, 16, 2, 64}, 7, {0, 3, 9, 15}, {7, 0, 3, -1});
    append<fp16, fp16>({1, 1, 12, 64}, 1, {0}, {});
    append<float, float>({3, 300, 1, 32}, 1, {299, 0, 17}, {});
}

CASE("append_to_cache, dtypes, odd and unaligned heads") {
    append<float, bf16>({2, 9, 3, 40}, 2, {1, 7}, {});
    append<bf16, float>({2, 9, 3, 40}, 2, {1, 7}, {});
    append<float, fp16>({2, 9, 3, 5}, 2, {1, 7}, {});
    append<fp16, bf16>({2, 9, 3, 1}, 2, {1, 7}, {});
    append<bf16, bf16>({2, 9, 3, 64}, 2, {1, 7}, {}, 1);
    append<float, float>({2, 9, 3, 64}, 2, {1, 7}, {}, 2);
}

// Every kernel once: from each dtype to each, aligned and not.
template <class From, class To>
void append_of_both_kinds() {
    append<From, To>({1, 3, 1, 16}, 1, {1}, {});
    append<From, To>({1, 3, 1, 5}, 1, {1}, {});
}

template <class From>
void append_to_every_dtype() {
    append_of_both_kinds<From, float>();
    append_of_both_kinds<From, bf16>();
    append_of_both_kinds<From, fp16>();
}

CASE("append_to_cache from every dtype to every dtype") {
    append_to_every_dtype<float>();
    append_to_every_dtype<bf16>();
    append_to_every_dtype<fp16>();
}

CASE("append_to_cache past the end of a row") {
    expect_error("__trap", [] { append<float, float>({2, 4, 1, 8}, 2, {0, 3}, {}); });
    expect_error("__trap", [] { append_int8<float>({2, 4, 1, 8}, 2, {0, 3}, {}); });
}

// T is as wide as the elements; numbers count up, so that each is there once.
template <class T>
void reorder(HeadsShape shape, const std::vector<int64_t>& rows, int64_t offset = 0) {
    CacheMemory<T> k(shape, 1, offset), v(shape, 2, offset);
    for (CacheMemory<T>* cache : {&k, &v}) {
        for (int64_t i = 0; i < cache->memory().size(); ++i) cache->memory()[i] = T(i % 251);
    }
    std::vector<CacheMemory<T>*> caches{&k, &v};
    std::vector<std::vector<T>> before;
    for (CacheMemory<T>* cache : caches) {
        const T* data = cache->memory().data();
        before.emplace_back(data, data + cache->memory().size());
    }
    const Buffer<int64_t> order = integers(rows);
    launch::ReorderCache args{};
    args.cache[0] = k.heads(0);
    args.cache[1] = v.heads(0);
    args.rows = {order.data(), 1};
    args.count = int64_t(rows.size());
    args.batch = shape.rows;
    args.entries = shape.entries;
    args.heads = shape.heads;
    args.head_dim = shape.head_dim;
    args.element_size = sizeof(T);
    launch::reorder_cache(args, nullptr);
    for (size_t which = 0; which < 2; ++which) {
        CacheMemory<T>& cache = *caches[which];
        const int64_t row_stride = cache.row_stride();
        const int64_t width = shape.heads * shape.head_dim;
        for (int64_t i = 0; i < cache.memory().size(); ++i) {
            int64_t from = i;
            const int64_t row = (i - offset) / row_stride;
            const bool first_part = (i - offset) % cache.entry_stride() < width;
            if (i >= offset && first_part && row < args.count) {
                from += (rows[size_t(row)] - row) * row_stride;
            }
            expect_same(double(cache.memory()[i]), double(before[which][size_t(from)]),
                        "element " + std::to_string(i));
        }
    }
}

CASE("reorder_cache: rings, repetitions, prefixes") {
    reorder<uint16_t>({7, 3, 2, 32}, {1, 2, 3, 4, 5, 6, 0});
    reorder<uint16_t>({7, 3, 2, 32}, {6, 6, 6, 6, 6, 6, 6});
    reorder<uint16_t>({7, 3, 2, 32}, {1, 0, 3, 2});
    reorder<uint16_t>({7, 3, 2, 32}, {3, 3, 0, 1, 6, 5, 4});
    reorder<uint32_t>({4, 70, 1, 8}, {2, 0, 1, 3});
    reorder<uint32_t>({4, 5, 1, 8}, {});
}

CASE("reorder_cache: odd and unaligned heads, many rows") {
    reorder<uint16_t>({5, 3, 2, 6}, {4, 3, 2, 1, 0});
    reorder<uint16_t>({5, 3, 2, 5}, {4, 3, 2, 1, 0});
    reorder<uint16_t>({5, 3, 2, 8}, {4, 3, 2, 1, 0}, 1);
    reorder<uint8_t>({5, 3, 2, 3}, {1, 1, 4, 2, 0}, 3);
    std::vector<int64_t> reversed(97);
    for (size_t i = 0; i < reversed.size(); ++i) reversed[i] = int64_t(reversed.size() - 1 - i);
    reorder<uint32_t>({97, 1, 1, 8}, reversed);
    expect_error("__trap", [] { reorder<uint32_t>({4, 5, 1, 8}, {0, 4}); });
}

CASE("release_rows, repeated and strided") {
    Buffer<int64_t> lengths(300, 7);
    const Buffer<int64_t> rows = integers({3, -9, 140, -9, 3, -9});
    launch::release_rows({lengths.data(), 2, 150, {rows.data(), 2}, 3}, nullptr);
    for (int64_t i = 0; i < lengths.size(); ++i) {
        expect_same(double(lengths[i]), i == 6 || i == 280 ? 0 : 7, "length " + std::to_string(i));
    }
    const Buffer<int64_t> outside = integers({150});
    expect_error("__trap", [&] {
        launch::release_rows({lengths.data(), 2, 150, {outside.data(), 1}, 1}, nullptr);
    });
}

}  // namespace
}  // namespace gpt2fast::simulated
