// Cases for launch/cached_attention.h.
#include "launch/cached_attention.h"

#include <algorithm>

#include "heads.h"

namespace gpt2fast::simulated {
namespace {

// Entries past a row's newest are NaN; of int8 caches, their factors. Queries are one part of
// three; the caches lie `offset` elements behind aligned memory.
template <class Q, class C>
void attend(HeadsShape cache_shape, int64_t time, const std::vector<int64_t>& lengths,
            int64_t offset = 0) {
    const auto& [rows, entries, heads, head_dim] = cache_shape;
    const std::string what = name_of<Q>() + " to " + name_of<C>() + ", time " +
                             std::to_string(time) + ", head size " + std::to_string(head_dim);
    Random random;
    CacheMemory<Q> packed({rows, time, heads, head_dim}, 3);
    constexpr bool is_int8 = std::is_same_v<C, int8_t>;
    CacheMemory<C> k(cache_shape, 1, offset), v(cache_shape, 1, offset);
    CacheMemory<float> k_scales = factors(cache_shape), v_scales = factors(cache_shape);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t step = 0; step < time; ++step) packed.fill(random, row, step);
        const int64_t used = std::min(lengths[size_t(row)] + time, entries);
        for (int64_t entry = 0; entry < used; ++entry) {
            k.fill(random, row, entry);
            v.fill(random, row, entry);
            k_scales.fill(random, row, entry, 0.02f);
            v_scales.fill(random, row, entry, 0.02f);
        }
    }
    const float scale = 0.75f / std::sqrt(float(head_dim));
    std::vector<double> exact;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t step = 0; step < time; ++step) {
            const int64_t seen = std::min(lengths[size_t(row)] + step + 1, entries);
            for (int64_t head = 0; head < heads; ++head) {
                std::vector<double> weights, sums(size_t(head_dim), 0.0);
                double total = 0;
                for (int64_t entry = 0; entry < seen; ++entry) {
                    double score = 0;
                    for (int64_t d = 0; d < head_dim; ++d) {
                        score += to_double(packed.at(0, row, step, head, d)) *
                                 to_double(k.at(0, row, entry, head, d));
                    }
                    if (is_int8) score *= double(k_scales.at(0, row, entry, head, 0));
                    weights.push_back(std::exp(score * double(scale)));
                    total += weights.back();
                }
                for (int64_t entry = 0; entry < seen; ++entry) {
                    for (int64_t d = 0; d < head_dim; ++d) {
                        const double factor =
                            is_int8 ? double(v_scales.at(0, row, entry, head, 0)) : 1.0;
                        sums[size_t(d)] += weights[size_t(entry)] / total * factor *
                                           to_double(v.at(0, row, entry, head, d));
                    }
                }
                exact.insert(exact.end(), sums.begin(), sums.end());
            }
        }
    }
    Buffer<Q> out(rows * time * heads * head_dim);
    const Buffer<int64_t> length = integers(lengths);
    launch::CachedAttention args{};
    args.q = packed.const_heads(0);
    args.out = out.data();
    args.k = k.const_heads(0);
    args.v = v.const_heads(0);
    if (is_int8) {
        args.k_scales = k_scales.const_heads(0);
        args.v_scales = v_scales.const_heads(0);
    }
    args.lengths = {length.data(), 1};
    args.batch = rows;
    args.time = time;
    args.heads = heads;
    args.head_dim = head_dim;
    args.entries = entries;
    args.scale = scale;
    args.dtype = dtype_of<Q>;
    args.cache_dtype = dtype_of<C>;
    Buffer<float> partials(launch::cached_attention_partials(args));
    Buffer<unsigned> tickets(launch::cached_attention_tickets(args), 0u);
    args.partials = partials.data();
    args.tickets = tickets.data();
    launch::cached_attention(args, nullptr);
    expect_each(out, exact, 4, 1.0, what);
    for (int64_t i = 0; i < tickets.size(); ++i) {
        expect_same(tickets[i], 0, what + ": ticket " + std::to_string(i));
    }
}

CASE("cached_attention, one query, rows that end within and between blocks") {
    attend<bf16, bf16>({2, 200, 1, 64}, 1, {0, 199});
    attend<bf16, bf16>({2, 200, 1, 64}, 1, {63, 64});
    attend<float, float>({2, 200, 1, 64}, 1, {31, 100});
    attend<fp16, fp16>({1, 130, 2, 128}, 1, {129});
    attend<float, float>({1, 1, 1, 32}, 1, {0});
}

CASE("cached_attention, several queries") {
    attend<bf16, bf16>({1, 140, 1, 64}, 2, {125});
    attend<bf16, bf16>({2, 40, 1, 32}, 5, {0, 30});
    attend<float, float>({1, 33, 1, 96}, 17, {7});
    attend<fp16, bf16>({1, 70, 1, 40}, 4, {66});
}

CASE("cached_attention, queries past the end, odd and unaligned heads") {
    attend<float, float>({1, 10, 1, 32}, 6, {7});
    attend<float, bf16>({1, 40, 2, 33}, 3, {20});
    attend<bf16, float>({1, 40, 2, 6}, 1, {20});
    attend<bf16, bf16>({1, 70, 1, 64}, 1, {66}, 1);
}

CASE("cached_attention to 8 bits") {
    attend<bf16, int8_t>({2, 300, 1, 64}, 1, {0, 299});
    attend<float, int8_t>({2, 200, 2, 64}, 1, {63, 127});
    attend<fp16, int8_t>({1, 140, 1, 128}, 5, {125});
    attend<float, int8_t>({1, 33, 1, 96}, 17, {7});
    attend<bf16, int8_t>({1, 40, 2, 33}, 3, {20});
    attend<float, int8_t>({1, 70, 1, 64}, 1, {66}, 1);
    attend<float, int8_t>({1, 10, 1, 32}, 6, {7});
}

// Every kernel once: all dtypes, aligned and not, one query and several.
template <class Q, class C = Q>
void attend_of_all_kinds() {
    for (const int64_t time : {1, 2}) {
        for (const int64_t head_dim : {8, 16, 32, 40, 64, 128, 5, 33, 100}) {
            attend<Q, C>({1, 4, 1, head_dim}, time, {2});
        }
    }
}

CASE("cached_attention of every dtype and head size") {
    attend_of_all_kinds<float>();
    attend_of_all_kinds<bf16>();
    attend_of_all_kinds<fp16>();
    attend_of_all_kinds<float, int8_t>();
}

CASE("cached_attention refuses heads that are too wide") {
    expect_error("128", [] { attend<float, float>({1, 4, 1, 136}, 1, {0}); });
}

}  // namespace
}  // namespace gpt2fast::simulated
