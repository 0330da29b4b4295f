// A whole-model step (Radford et al., 2019): new tokens of one or many sequences in, logits out.
//
// Every thread of the team walks through the same chain of phases. Each phase is one matrix, one
// attention or one normalization, and ends at a barrier. With few tokens what lies between two
// matrices - layer normalization, the packing of rows - is done by every thread for itself, which
// costs less than another barrier.
//
// Traffic of a step with few tokens: the bytes of the weights, once, and of the keys and values in
// use. With many tokens the multiply-adds of the matrices bound it.
//
// What a token gives depends on its own text alone, bit for bit: neither on the tokens beside it
// nor on the threads. So products sum in one order for any number of rows (gemm.h), and entries are
// cut by their places (attention_heads.h). Tiles of AMX round otherwise than vectors, and take over
// by the number of rows: there it does not hold.
#pragma once

#include "attention.h"
#include "attention_heads.h"
#include "row_products.h"

namespace gpt2fast::GPT2FAST_ISA {

// out = (x - mean) / sqrt(var + eps) * weight + bias over `size` elements.
inline void normalize(const float* x, int64_t size, const float* weight, const float* bias,
                      float eps, float* out) {
    constexpr int width = Vec::width;
    const int64_t whole = size / width * width;
    const int rest = int(size - whole);
    Vec sum(0.0f);
    for (int64_t i = 0; i < whole; i += width) sum = sum + Vec::load(x + i);
    if (rest) sum = sum + Vec::load(x + whole, rest);
    const float mean = reduce_add(sum) / float(size);
    Vec squares(0.0f);
    float tail = 0.0f;
    for (int64_t i = 0; i < whole; i += width) {
        const Vec d = Vec::load(x + i) - Vec(mean);
        squares = fma(d, d, squares);
    }
    for (int64_t i = whole; i < size; ++i) tail += (x[i] - mean) * (x[i] - mean);
    const float variance = (reduce_add(squares) + tail) / float(size);
    const Vec rstd(1.0f / std::sqrt(variance + eps));
    for (int64_t i = 0; i < whole; i += width) {
        fma((Vec::load(x + i) - Vec(mean)) * rstd, Vec::load(weight + i), Vec::load(bias + i))
            .store(out + i);
    }
    if (rest) {
        fma((Vec::load(x + whole, rest) - Vec(mean)) * rstd, Vec::load(weight + whole, rest),
            Vec::load(bias + whole, rest))
            .store(out + whole, rest);
    }
}

inline Vec activate(Activation activation, Vec z) {
    switch (activation) {
        case Activation::gelu_new: return gelu(z);
        case Activation::relu: return max(Vec(0.0f), z);
        case Activation::silu: return z / (Vec(1.0f) + exp(Vec(0.0f) - z));
        case Activation::tanh: return tanh(z);
        case Activation::gelu: break;
    }
    float values[Vec::width];
    z.store(values);
    for (float& x : values) x = 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    return Vec::load(values);
}

class Step {
public:
    Step(const StepArgs& args, Worker& worker)
        : args_(args), model_(*args.model), worker_(worker), width_(model_.width),
          shares_parts_(shares_parts(args, worker.threads())) {
        uint8_t* next = args.workspace;
        hidden_ = floats(next, args.tokens * width_);
        qkv_ = floats(next, args.tokens * 3 * width_);
        attended_ = floats(next, args.tokens * width_);
        inner_ = floats(next, args.tokens * model_.inner_width);
        const bool shared = args.tokens > few_tokens || worker.threads() == 1;
        const int64_t packed = packed_size(args), scratch = scratch_size(args);
        uint8_t* rows = take(next, packed * (shared ? 1 : worker.threads()));
        scratch_ = floats(next, scratch * worker.threads()) + scratch * worker.index();
        products_ = RowProducts(args, worker, shared, rows + (shared ? 0 : packed * worker.index()),
                                scratch_);
        gathered_ = take(next, gathered_size(args));
        partial_ = floats(next, partial_size(args, worker.threads()));
        for (int64_t i = 0; i < args.sequences; ++i) {
            block_count_ += blocks_of(i);
            if (is_apart(i)) apart_parts_ += parts_of(entries_of(i));
        }
        // Where there are fewer parts than keep all threads busy, heads are shared out as well.
        const int64_t wanted = items_per_thread * worker.threads();
        if (apart_parts_ > 0) {
            groups_ = std::min(model_.heads, (wanted + apart_parts_ - 1) / apart_parts_);
        }
    }

    void run() {
        const auto set = [](Vec, Vec sum) { return sum; };
        const auto add = [](Vec before, Vec sum) { return before + sum; };
        embed();
        for (int64_t layer = 0; layer < model_.layers; ++layer) {
            const PackedLayer& at = model_.layer(layer);
            pack_normalized(at.qkv, at.ln_1_weight, at.ln_1_bias);
            multiply(at.qkv, at.attention_out, qkv_, set);
            attend(layer, float(at.scale));
            pack_attended(at.attention_out);
            multiply(at.attention_out, at.inner, hidden_, add);
            pack_normalized(at.inner, at.ln_2_weight, at.ln_2_bias);
            multiply(at.inner, at.mlp_out, inner_,
                     [&](Vec, Vec sum) { return activate(model_.activation, sum); });
            pack_plain(at.mlp_out, inner_, model_.inner_width);
            const PackedMatrix& next =
                layer + 1 < model_.layers ? model_.layer(layer + 1).qkv : model_.projection;
            multiply(at.mlp_out, next, hidden_, add);
        }
        if (args_.outputs == 0) return;
        pack_normalized(model_.projection, model_.ln_f_weight, model_.ln_f_bias,
                        args_.output_tokens, args_.outputs);
        products_.multiply(model_.projection, model_.layer(0).qkv, args_.outputs, args_.logits,
                           set);
    }

    static int64_t workspace(const StepArgs& args, int threads) {
        const PackedModel& model = *args.model;
        const int64_t activations = args.tokens * (5 * model.width + model.inner_width) + 4 * 16;
        return 4 * activations + packed_size(args) * threads + 64 +
               4 * scratch_size(args) * threads + 64 + gathered_size(args) + 64 +
               4 * partial_size(args, threads) + 64;
    }

private:
    static uint8_t* take(uint8_t*& next, int64_t bytes) {
        uint8_t* begin = next;
        next += (bytes + 63) / 64 * 64;
        return begin;
    }
    static float* floats(uint8_t*& next, int64_t count) {
        return reinterpret_cast<float*>(take(next, 4 * count));
    }

    // Bytes for the packed rows of any of the model's matrices.
    static int64_t packed_size(const StepArgs& args) {
        const PackedModel& model = *args.model;
        int64_t most =
            RowProducts::packed_size(model.projection, std::max<int64_t>(1, args.outputs));
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const PackedLayer& at = model.layer(layer);
            for (const PackedMatrix* w : {&at.qkv, &at.attention_out, &at.inner, &at.mlp_out}) {
                most = std::max(most, RowProducts::packed_size(*w, args.tokens));
            }
        }
        return (most + 63) / 64 * 64;
    }

    // Floats of each thread's own scratch: a normalized row, sums of parts, scores, a panel.
    static int64_t scratch_size(const StepArgs& args) {
        const PackedModel& model = *args.model;
        int64_t longest = part_entries;
        for (int64_t i = 0; i < args.sequences; ++i) {
            if (is_single(args, i)) longest = std::max(longest, entries_of(args, i));
        }
        int64_t most =
            part_size(model) + attend_heads_scratch(model.heads, model.head_dim, longest);
        most = std::max(most, attention_scratch(model.head_dim));
        most = std::max(most, RowProducts::scratch_size(model.projection));
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const PackedLayer& at = model.layer(layer);
            for (const PackedMatrix* w : {&at.qkv, &at.attention_out, &at.inner, &at.mlp_out}) {
                most = std::max(most, RowProducts::scratch_size(*w));
            }
        }
        return (most + 15) / 16 * 16;
    }

    // Whether entries are copied before blocks read them: those of int8, to be widened, and those
    // of pages.
    static bool gathers(const StepArgs& args) {
        return args.cache_dtype == DType::int8 || args.pages != nullptr;
    }

    // Bytes for the entries that blocks read; as bfloat16, with one element more, they take no more
    // than as floats.
    static int64_t gathered_size(const StepArgs& args) {
        if (!gathers(args)) return 0;
        int64_t entries = 0;
        for (int64_t i = 0; i < args.sequences; ++i) {
            if (!is_single(args, i)) entries += entries_of(args, i);
        }
        return 2 * entries * args.model->width * int64_t(sizeof(float));
    }

    static int64_t tokens_of(const StepArgs& args, int64_t sequence) {
        return args.starts[sequence + 1] - args.starts[sequence];
    }
    static int64_t entries_of(const StepArgs& args, int64_t sequence) {
        return args.lengths[sequence] + tokens_of(args, sequence);
    }
    // Whether a sequence's tokens attend by themselves, and not in blocks.
    static bool is_single(const StepArgs& args, int64_t sequence) {
        return args.singly ? args.singly[sequence] : tokens_of(args, sequence) == 1;
    }

    // Pieces of work that every thread finds, so that all end at about the same time.
    static constexpr int64_t items_per_thread = 4;

    // Whether the threads share the parts of a single token's entries: where there are tokens
    // enough for all, one of them reads a token's parts one after another.
    static bool shares_parts(const StepArgs& args, int threads) {
        int64_t singles = 0;
        for (int64_t i = 0; i < args.sequences; ++i) {
            if (is_single(args, i)) singles += tokens_of(args, i);
        }
        return threads > 1 && singles < items_per_thread * threads;
    }

    // Whether a sequence's parts are computed apart and added up later: where threads share them,
    // and where several tokens read them, so that memory gives them once.
    static bool is_apart(const StepArgs& args, int64_t sequence, bool shares_parts) {
        return is_single(args, sequence) && (shares_parts || tokens_of(args, sequence) > 1);
    }
    bool is_apart(int64_t sequence) const { return is_apart(args_, sequence, shares_parts_); }

    // Floats of a part's sums.
    static int64_t part_size(const PackedModel& model) {
        return (model.width + 2 * model.heads + 15) / 16 * 16;
    }

    // Sums of a sequence that are kept apart: of each token's parts.
    static int64_t sums_apart(const StepArgs& args, int64_t sequence, bool shares_parts) {
        if (!is_apart(args, sequence, shares_parts)) return 0;
        return tokens_of(args, sequence) * parts_of(entries_of(args, sequence));
    }

    static int64_t partial_size(const StepArgs& args, int threads) {
        const bool shares = shares_parts(args, threads);
        int64_t sums = 0;
        for (int64_t i = 0; i < args.sequences; ++i) sums += sums_apart(args, i, shares);
        return sums * part_size(*args.model);
    }

    void embed() {
        const PackedMatrix& w = model_.embedding;
        const uint8_t* data = model_.at(w.data);
        const float* wpe = model_.floats(model_.wpe);
        worker_.for_each(args_.tokens, [&](int64_t token) {
            float* row = hidden_ + token * width_;
            unpack_column(w, data, args_.token_ids[token], row);
            const float* position = wpe + args_.positions[token] * width_;
            for (int64_t i = 0; i < width_; ++i) row[i] += position[i];
        });
    }

    // out (tokens, w's outputs) = combine(out, packed rows times w); `next` is the matrix after w.
    template <typename Combine>
    void multiply(const PackedMatrix& w, const PackedMatrix& next, float* out, Combine combine) {
        products_.multiply(w, next, args_.tokens, out, combine);
    }

    void pack_plain(const PackedMatrix& w, const float* x, int64_t stride) {
        products_.pack(w, args_.tokens, [&](int64_t row) { return x + row * stride; });
    }

    // Packs the attention's result, adding up parts that were computed apart.
    void pack_attended(const PackedMatrix& w) {
        if (apart_parts_ == 0) return pack_plain(w, attended_, width_);
        const int heads = int(model_.heads), dim = int(model_.head_dim);
        products_.pack(w, args_.tokens, [&](int64_t row) -> const float* {
            int64_t sequence = 0;
            while (row >= args_.starts[sequence + 1]) ++sequence;
            if (!is_apart(sequence)) return attended_ + row * width_;
            const int64_t token = row - args_.starts[sequence];
            const int64_t parts = parts_of(args_.lengths[sequence] + token + 1);
            std::memcpy(scratch_, sums_of(sequence, token, 0).values,
                        size_t(part_size(model_)) * sizeof(float));
            const PartSums sums = sums_at(scratch_);
            for (int64_t part = 1; part < parts; ++part) {
                add_part(sums_of(sequence, token, part), heads, dim, sums);
            }
            divide_by_total(sums, heads, dim);
            return scratch_;
        });
    }

    // The sums of a part for one of a sequence's tokens.
    PartSums sums_of(int64_t sequence, int64_t token, int64_t part) const {
        int64_t index = token * parts_of(entries_of(sequence)) + part;
        for (int64_t i = 0; i < sequence; ++i) index += sums_apart(args_, i, shares_parts_);
        return sums_at(partial_ + index * part_size(model_));
    }
    PartSums sums_at(float* at) const { return {at, at + width_, at + width_ + model_.heads}; }

    // Packs the layer normalization of hidden rows: of all, or of the chosen ones.
    void pack_normalized(const PackedMatrix& w, int64_t weight, int64_t bias,
                         const int64_t* chosen = nullptr, int64_t count = -1) {
        products_.pack(w, count < 0 ? args_.tokens : count, [&](int64_t row) {
            normalize(hidden_ + (chosen ? chosen[row] : row) * width_, width_,
                      model_.floats(weight), model_.floats(bias), float(model_.eps), scratch_);
            return scratch_;
        });
    }

    void attend(int64_t layer, float scale) {
        switch (args_.cache_dtype) {
            case DType::float32: return attend<float>(layer, scale);
            case DType::bfloat16: return attend<bfloat16>(layer, scale);
            default: return attend<int8_t>(layer, scale);
        }
    }

    // Rounds x to int8, the largest element to 127; returns the factor, which is NaN or infinite if
    // an element is. gpt2fast/ops/int8_cache.py defines both.
    static float narrow(const float* x, int64_t size, int8_t* to) {
        const int64_t whole = size / Vec::width * Vec::width;
        Vec largest(0.0f);
        for (int64_t i = 0; i < whole; i += Vec::width)
            largest = max(largest, abs(Vec::load(x + i)));
        float most = reduce_max(largest);
        for (int64_t i = whole; i < size; ++i) most = std::max(most, std::fabs(x[i]));
        const float inverse = 127.0f / std::max(most, 1e-30f);
        Vec sum(0.0f);  // keeps what a maximum may ignore
        for (int64_t i = 0; i < whole; i += Vec::width) {
            const Vec scaled = Vec::load(x + i) * Vec(inverse);
            scaled.store(to + i);
            sum = sum + scaled;
        }
        float total = reduce_add(sum);
        for (int64_t i = whole; i < size; ++i) {
            const float scaled = x[i] * inverse;
            to[i] = int8_t(std::lrint(scaled));
            total += scaled;
        }
        if (std::isfinite(total)) return most / 127.0f;
        std::memset(to, 0, size_t(size));
        const bool unknown = std::any_of(x, x + size, [](float v) { return std::isnan(v); });
        return unknown ? std::numeric_limits<float>::quiet_NaN() : most;
    }

    // Stores one head's keys or values of a sequence's tokens behind its entries.
    template <typename T>
    void append(const CacheView& cache, int64_t layer, int64_t sequence, int64_t head,
                const float* from) {
        const CachedHeads<T> at = heads_of<T>(cache, layer, sequence, head);
        const int64_t begin = args_.starts[sequence], dim = model_.head_dim;
        for (int64_t i = 0; i < tokens_of(args_, sequence); ++i) {
            const float* x = from + (begin + i) * 3 * width_ + head * dim;
            const int64_t entry = args_.lengths[sequence] + i;
            T* to = const_cast<T*>(at.at(entry));
            if constexpr (std::is_same_v<T, int8_t>) {
                *const_cast<float*>(at.scales_at(entry)) = narrow(x, dim, to);
            } else {
                for (int64_t d = 0; d < dim; ++d) gpt2fast::assign(to[d], x[d]);
            }
        }
    }

    // A sequence's entries, from one head on.
    template <typename T>
    CachedHeads<T> heads_of(const CacheView& cache, int64_t layer, int64_t sequence, int64_t head) {
        const bool paged = args_.pages != nullptr;
        const int64_t row = paged ? 0 : args_.rows[sequence];
        const T* data = static_cast<const T*>(cache.data) + layer * cache.layer_stride +
                        row * cache.row_stride + head * model_.head_dim;
        const float* scales = nullptr;
        if (std::is_same_v<T, int8_t>) {
            scales = cache.scales + layer * cache.scale_layer_stride +
                     row * cache.scale_row_stride + head;
        }
        const int64_t* pages = paged ? args_.pages + sequence * args_.pages_stride : nullptr;
        return {data,  cache.entry_stride, scales,           cache.scale_entry_stride,
                pages, args_.page_size,    cache.row_stride, cache.scale_row_stride};
    }

    // Sequences with single tokens alone: whoever reads a token's last part appends it before.
    // Otherwise all are appended first.
    template <typename T>
    void attend(int64_t layer, float scale) {
        const bool appends = block_count_ == 0 && args_.tokens == args_.sequences;
        if (!appends) {
            worker_.for_each(args_.sequences * model_.heads, [&](int64_t item) {
                const int64_t sequence = item / model_.heads, head = item % model_.heads;
                append_head<T>(layer, sequence, head);
                if (gathers(args_) && !is_single(args_, sequence)) {
                    gather<T>(layer, sequence, head);
                }
            });
        }
        const int64_t block_items = block_count_ * model_.heads;
        const int64_t apart_items = apart_parts_ * groups_;
        const int64_t whole_items = shares_parts_ ? 0 : args_.sequences;
        worker_.for_each(block_items + apart_items + whole_items, [&](int64_t item) {
            if (item < block_items) return attend_block_of<T>(layer, scale, item);
            item -= block_items;
            if (item < apart_items) return attend_part_of<T>(layer, scale, item, appends);
            attend_whole<T>(layer, scale, item - apart_items, appends);
        });
    }

    template <typename T>
    void append_head(int64_t layer, int64_t sequence, int64_t head) {
        append<T>(args_.k_cache, layer, sequence, head, qkv_ + width_);
        append<T>(args_.v_cache, layer, sequence, head, qkv_ + 2 * width_);
    }

    // A sequence's single token.
    template <typename T>
    void attend_whole(int64_t layer, float scale, int64_t sequence, bool appends) {
        if (!is_single(args_, sequence) || is_apart(sequence)) return;
        const int64_t heads = model_.heads, dim = model_.head_dim;
        for (int64_t head = 0; appends && head < heads; ++head) {
            append_head<T>(layer, sequence, head);
        }
        const int64_t token = args_.starts[sequence];
        const PartSums sums = {attended_ + token * width_, scratch_, scratch_ + heads};
        attend_heads<T>(qkv_ + token * 3 * width_, int(heads), 0, entries_of(sequence),
                        heads_of<T>(args_.k_cache, layer, sequence, 0),
                        heads_of<T>(args_.v_cache, layer, sequence, 0), int(dim), scale, true,
                        scratch_ + part_size(model_), sums);
        divide_by_total(sums, int(heads), int(dim));
    }

    // Some heads of a part of a sequence's entries, for all of its tokens that see it.
    template <typename T>
    void attend_part_of(int64_t layer, float scale, int64_t item, bool appends) {
        const int64_t heads = model_.heads, dim = model_.head_dim;
        int64_t sequence = 0, part = item / groups_;
        for (;; ++sequence) {
            const int64_t parts = is_apart(sequence) ? parts_of(entries_of(sequence)) : 0;
            if (part < parts) break;
            part -= parts;
        }
        const int64_t group = item % groups_;
        const int64_t first = heads * group / groups_, last = heads * (group + 1) / groups_;
        const int64_t begin = part * part_entries, end = begin + part_entries;
        if (appends && end >= entries_of(sequence)) {
            for (int64_t head = first; head < last; ++head) append_head<T>(layer, sequence, head);
        }
        const CachedHeads<T> k = heads_of<T>(args_.k_cache, layer, sequence, first);
        const CachedHeads<T> v = heads_of<T>(args_.v_cache, layer, sequence, first);
        bool reads_ahead = true;  // for the first token; then the part is near
        for (int64_t token = 0; token < tokens_of(args_, sequence); ++token) {
            const int64_t seen = args_.lengths[sequence] + token + 1;
            if (seen <= begin) continue;
            const float* q = qkv_ + (args_.starts[sequence] + token) * 3 * width_ + first * dim;
            attend_heads<T>(q, int(last - first), begin, std::min(end, seen), k, v, int(dim), scale,
                            reads_ahead, scratch_,
                            sums_of(sequence, token, part).from_head(int(first), int(dim)));
            reads_ahead = false;
        }
    }

    // The type in which blocks read entries: of int8 the one that the processor multiplies fastest.
    template <typename T>
    using BlockEntry = std::conditional_t<std::is_same_v<T, int8_t>, Factor<bfloat16>, T>;

    // Elements from one gathered entry to the next: whole words.
    template <typename T>
    int64_t gathered_dim() const {
        constexpr int u = inputs_per_word(format_of<T>);
        return (model_.head_dim + u - 1) / u * u;
    }

    // Where a head's gathered keys lie, the values behind them.
    template <typename T>
    T* gathered(int64_t sequence, int64_t head) {
        int64_t before = 0;
        for (int64_t i = 0; i < sequence; ++i) {
            if (!is_single(args_, i)) before += entries_of(i);
        }
        return static_cast<T*>(static_cast<void*>(gathered_)) +
               2 * (before * model_.heads + head * entries_of(sequence)) * gathered_dim<T>();
    }

    // Copies a head's keys and values to where a sequence's blocks read them.
    template <typename T>
    void gather(int64_t layer, int64_t sequence, int64_t head) {
        const int64_t entries = entries_of(sequence);
        BlockEntry<T>* to = gathered<BlockEntry<T>>(sequence, head);
        for (const CacheView* cache : {&args_.k_cache, &args_.v_cache}) {
            const CachedHeads<T> from = heads_of<T>(*cache, layer, sequence, head);
            for (int64_t t = 0; t < entries; ++t, to += gathered_dim<BlockEntry<T>>()) {
                if constexpr (std::is_same_v<T, int8_t>) {
                    widen(from.at(t), *from.scales_at(t), to);
                } else {
                    std::memcpy(to, from.at(t), size_t(model_.head_dim) * sizeof(T));
                }
            }
        }
    }

    template <typename T>
    void widen(const int8_t* entry, float scale, T* to) {
        const int dim = int(model_.head_dim);
        const Vec factor(scale);
        if (gathered_dim<T>() > dim) to[dim] = T{};
        int d = 0;
        for (; d + Vec::width <= dim; d += Vec::width) {
            (Vec::load(entry + d) * factor).store(to + d);
        }
        if (const int n = dim - d) (Vec::load(entry + d, n) * factor).store(to + d, n);
    }

    // A block of 32 tokens of a sequence.
    template <typename T>
    void attend_block_of(int64_t layer, float scale, int64_t item) {
        using Entry = BlockEntry<T>;
        const int64_t heads = model_.heads, dim = model_.head_dim, head = item % heads;
        int64_t sequence = 0, block = item / heads;
        while (block >= blocks_of(sequence)) block -= blocks_of(sequence++);
        // The last blocks see the most entries: they start first, and short ones fill in at the
        // end.
        block = blocks_of(sequence) - 1 - block;
        const int64_t start = args_.starts[sequence] + block * panel_columns;
        const int queries =
            int(std::min<int64_t>(panel_columns, args_.starts[sequence + 1] - start));
        const int64_t first = args_.lengths[sequence] + block * panel_columns;
        Entries<Entry> keys, values;
        if (gathers(args_)) {
            keys = {gathered<Entry>(sequence, head), gathered_dim<Entry>()};
            values = {keys.data + entries_of(sequence) * keys.stride, keys.stride};
        } else if constexpr (std::is_same_v<T, Entry>) {
            const CachedHeads<T> k = heads_of<T>(args_.k_cache, layer, sequence, head);
            const CachedHeads<T> v = heads_of<T>(args_.v_cache, layer, sequence, head);
            keys = {k.data, k.stride};
            values = {v.data, v.stride};
        }
        attend_block<Entry>(qkv_ + start * 3 * width_ + head * dim, 3 * width_, queries, first,
                            keys, values, int(dim), scale, scratch_,
                            attended_ + start * width_ + head * dim, width_, nullptr);
    }

    int64_t entries_of(int64_t sequence) const { return entries_of(args_, sequence); }
    int64_t blocks_of(int64_t sequence) const {
        if (is_single(args_, sequence)) return 0;
        return (tokens_of(args_, sequence) + panel_columns - 1) / panel_columns;
    }

    const StepArgs& args_;
    const PackedModel& model_;
    Worker& worker_;
    int64_t width_;
    bool shares_parts_;
    int64_t apart_parts_ = 0;  // of the entries of sequences whose parts are computed apart
    int64_t block_count_ = 0;
    int64_t groups_ = 1;  // of heads, in which parts are computed apart
    float *hidden_, *qkv_, *attended_, *inner_, *scratch_, *partial_;
    uint8_t* gathered_;
    RowProducts products_;
};

inline void step(const StepArgs& args, Worker& worker) { Step(args, worker).run(); }

inline int64_t step_workspace(const StepArgs& args, int threads) {
    return Step::workspace(args, threads);
}

}  // namespace gpt2fast::GPT2FAST_ISA
