// The only file that sees torch: hands tensors to the kernels as pointers and sizes.
//
// Built against torch's stable ABI, so that one binary serves many versions of torch and of Python.
// The ops live in the namespace gpt2fast_native; gpt2fast/ops decides when they run and has
// checked what they are given.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/bandwidth.h"
#include "cpu/fingerprint.h"
#include "cpu/kernels.h"
#include "cpu/row_copies.h"
#include "cpu/step.h"
#include "cpu/team.h"

namespace {

using gpt2fast::DType;
using gpt2fast::kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::float32;
        case ScalarType::BFloat16: return DType::bfloat16;
        case ScalarType::Char: return DType::int8;
        default: STD_TORCH_CHECK(false, "gpt2fast: dtype that the CPU kernels do not know");
    }
}

// Runs kernel(begin, end) over ranges of [0, items) on torch's own threads; `work` is the cost of
// an item in elements.
template <typename Kernel>
void parallel(int64_t items, int64_t work, Kernel kernel) {
    constexpr int64_t worthwhile = 32768;  // elements for which a second thread pays
    const int64_t grain = std::max<int64_t>(1, worthwhile / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, items, grain, kernel);
}

int threads() {
    static const int available = gpt2fast::available_processors();
    return std::min(int(torch::stable::get_num_threads()), available);
}

Tensor bias_gelu(Tensor x, Tensor bias) {
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const int64_t columns = x.size(1);
    const gpt2fast::BiasGelu args{x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(),
                                  columns,            x.stride(0),           dtype_of(x)};
    parallel(x.size(0), columns,
             [&](int64_t begin, int64_t end) { kernels().bias_gelu(args, begin, end); });
    return out;
}

gpt2fast::Blocks blocks_of(int64_t rows) {
    return {rows, std::min<int64_t>(64, std::max<int64_t>(1, rows / 16))};
}

// float32 tensors for what kernels share between their ranges.
Tensor floats(const Tensor& like, std::vector<int64_t> sizes) {
    return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats_of(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// The sums of the blocks in `sums` (blocks, stride), from column `first` on, added up.
Tensor added_blocks(const Tensor& sums, int64_t first, int64_t columns, const Tensor& like) {
    Tensor out = torch::stable::new_empty(like, {columns});
    const gpt2fast::AddBlocks args{floats_of(sums) + first, out.mutable_data_ptr(), sums.size(0),
                                   sums.size(1), dtype_of(like)};
    parallel(columns, sums.size(0),
             [&](int64_t begin, int64_t end) { kernels().add_blocks(args, begin, end); });
    return out;
}

// Writes the gradient into `grad` and, where it is given, the activation into `activated`.
Tensor bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor grad_x,
                          std::optional<Tensor> activated) {
    const int64_t columns = x.size(1);
    const gpt2fast::Blocks blocks = blocks_of(x.size(0));
    const Tensor sums = floats(x, {blocks.count, columns});
    const gpt2fast::BiasGeluBackward args{
        grad.const_data_ptr(), x.const_data_ptr(), bias.const_data_ptr(), grad_x.mutable_data_ptr(),
        activated ? activated->mutable_data_ptr() : nullptr, floats_of(sums), blocks, columns,
        grad.stride(0), x.stride(0), dtype_of(x)};
    parallel(blocks.count, columns * (x.size(0) / blocks.count + 1),
             [&](int64_t begin, int64_t end) { kernels().bias_gelu_backward(args, begin, end); });
    return added_blocks(sums, 0, columns, bias);
}

Tensor sum_rows(Tensor x) {
    const gpt2fast::Blocks blocks = blocks_of(x.size(0));
    const Tensor sums = floats(x, {blocks.count, x.size(1)});
    const gpt2fast::SumRows args{x.const_data_ptr(), floats_of(sums), blocks,
                                 x.size(1),          x.stride(0),     dtype_of(x)};
    parallel(blocks.count, x.size(1) * (x.size(0) / blocks.count + 1),
             [&](int64_t begin, int64_t end) { kernels().sum_rows(args, begin, end); });
    return added_blocks(sums, 0, x.size(1), x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      Tensor weight, Tensor bias, double eps) {
    const int64_t rows = x.size(0), columns = x.size(1);
    Tensor normed = torch::stable::new_empty(x, x.sizes());
    Tensor summed = residual ? torch::stable::new_empty(*residual, x.sizes())
                             : torch::stable::new_empty(x, {0});
    Tensor mean = floats(x, {rows}), rstd = floats(x, {rows});
    const gpt2fast::LayerNorm args{x.const_data_ptr(),
                                   residual ? residual->const_data_ptr() : nullptr,
                                   weight.const_data_ptr(),
                                   bias.const_data_ptr(),
                                   normed.mutable_data_ptr(),
                                   summed.mutable_data_ptr(),
                                   floats_of(mean),
                                   floats_of(rstd),
                                   columns,
                                   x.stride(0),
                                   residual ? residual->stride(0) : 0,
                                   float(eps),
                                   dtype_of(x),
                                   dtype_of(residual ? *residual : x),
                                   dtype_of(weight)};
    parallel(rows, columns,
             [&](int64_t begin, int64_t end) { kernels().layer_norm(args, begin, end); });
    return {normed, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad,
                                                       std::optional<Tensor> grad_summed,
                                                       Tensor summed, Tensor mean, Tensor rstd,
                                                       Tensor weight) {
    const int64_t rows = summed.size(0), columns = summed.size(1);
    const gpt2fast::Blocks blocks = blocks_of(rows);
    Tensor grad_input = torch::stable::new_empty(summed, summed.sizes());
    const Tensor sums = floats(summed, {blocks.count, 2 * columns});
    const gpt2fast::LayerNormBackward args{grad.const_data_ptr(),
                                           grad_summed ? grad_summed->const_data_ptr() : nullptr,
                                           summed.const_data_ptr(),
                                           weight.const_data_ptr(),
                                           floats_of(mean),
                                           floats_of(rstd),
                                           grad_input.mutable_data_ptr(),
                                           floats_of(sums),
                                           blocks,
                                           columns,
                                           grad.stride(0),
                                           grad_summed ? grad_summed->stride(0) : 0,
                                           summed.stride(0),
                                           dtype_of(grad),
                                           dtype_of(summed),
                                           dtype_of(weight)};
    parallel(blocks.count, columns * (rows / blocks.count + 1),
             [&](int64_t begin, int64_t end) { kernels().layer_norm_backward(args, begin, end); });
    return {grad_input, added_blocks(sums, 0, columns, weight),
            added_blocks(sums, columns, columns, weight)};
}

gpt2fast::Heads heads_of(const Tensor& x) {
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

gpt2fast::Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& lse, double scale,
                                   const std::optional<Tensor>& visible, double dropout,
                                   int64_t seed) {
    gpt2fast::Attention args{};
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
    args.lse = floats_of(lse);
    args.visible = visible ? static_cast<const uint8_t*>(visible->const_data_ptr()) : nullptr;
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.head_dim = q.size(3);
    args.scale = float(scale);
    args.dropout = float(dropout);
    args.seed = uint64_t(seed);
    args.dtype = dtype_of(q);
    return args;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale,
                                     std::optional<Tensor> visible, double dropout, int64_t seed) {
    Tensor out = torch::stable::new_empty(q, q.sizes());
    Tensor lse = floats(q, {q.size(0), q.size(2), q.size(1)});
    gpt2fast::Attention args = attention_args(q, k, v, lse, scale, visible, dropout, seed);
    args.out = out.mutable_data_ptr();
    const int64_t blocks =
        (args.time + gpt2fast::attention_queries - 1) / gpt2fast::attention_queries;
    parallel(args.batch * args.heads * blocks,
             gpt2fast::attention_queries * args.time * args.head_dim / 16,
             [&](int64_t begin, int64_t end) { kernels().attention(args, begin, end); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      std::optional<Tensor> visible,
                                                      double dropout, int64_t seed) {
    Tensor grad_q = torch::stable::new_empty(q, q.sizes());
    Tensor grad_k = torch::stable::new_empty(k, k.sizes());
    Tensor grad_v = torch::stable::new_empty(v, v.sizes());
    const gpt2fast::AttentionBackward args{
        attention_args(q, k, v, lse, scale, visible, dropout, seed),
        heads_of(grad),
        heads_of(out),
        grad_q.mutable_data_ptr(),
        grad_k.mutable_data_ptr(),
        grad_v.mutable_data_ptr()};
    parallel(q.size(0) * q.size(2), q.size(1) * q.size(1) * q.size(3) / 16,
             [&](int64_t begin, int64_t end) { kernels().attention_backward(args, begin, end); });
    return {grad_q, grad_k, grad_v};
}

// Losses of rows of logits; with `differentiate` their gradients times `factor` take their place.
void cross_entropy(Tensor logits, Tensor targets, Tensor losses, int64_t ignore_index,
                   double factor, bool differentiate) {
    const auto* classes = static_cast<const int64_t*>(targets.const_data_ptr());
    const int64_t rows = logits.size(0), columns = logits.size(1);
    for (int64_t i = 0; i < rows; ++i) {
        STD_TORCH_CHECK(classes[i] == ignore_index || (classes[i] >= 0 && classes[i] < columns),
                        "gpt2fast: target ", classes[i], " is neither a class below ", columns,
                        " nor ignore_index=", ignore_index);
    }
    const gpt2fast::CrossEntropy args{logits.mutable_data_ptr(), classes,      floats_of(losses),
                                      columns,                   ignore_index, float(factor),
                                      differentiate,             dtype_of(logits)};
    parallel(rows, columns,
             [&](int64_t begin, int64_t end) { kernels().cross_entropy(args, begin, end); });
}

// sum (float32) += x, both contiguous.
void accumulate(Tensor sum, Tensor x) {
    const gpt2fast::Accumulate args{floats_of(sum), x.const_data_ptr(), dtype_of(x)};
    parallel(x.numel(), 1,
             [&](int64_t begin, int64_t end) { kernels().accumulate(args, begin, end); });
}

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
           double eps, double weight_decay) {
    constexpr int64_t piece_size = 16384;
    std::vector<gpt2fast::AdamWPiece> pieces;
    for (size_t i = 0; i < params.size(); ++i) {
        const DType dtype = dtype_of(params[i]);
        const int64_t bytes = dtype == DType::float32 ? 4 : 2;
        for (int64_t at = 0; at < params[i].numel(); at += piece_size) {
            const auto place = [&](const Tensor& x) {
                return static_cast<uint8_t*>(x.mutable_data_ptr()) + at * bytes;
            };
            pieces.push_back({place(params[i]),
                              static_cast<const uint8_t*>(grads[i].const_data_ptr()) + at * bytes,
                              place(exp_avgs[i]), place(exp_avg_sqs[i]),
                              std::min(piece_size, params[i].numel() - at), dtype});
        }
    }
    const gpt2fast::AdamW args{pieces.data(),
                               float(beta1),
                               float(beta2),
                               float(1.0 - beta1),
                               float(1.0 - beta2),
                               float(1.0 - lr * weight_decay),
                               float(lr / (1.0 - std::pow(beta1, double(step)))),
                               float(1.0 / std::sqrt(1.0 - std::pow(beta2, double(step)))),
                               float(eps)};
    parallel(int64_t(pieces.size()), piece_size,
             [&](int64_t begin, int64_t end) { kernels().adamw(args, begin, end); });
}

// Checks that look-ups lie inside their table.
const int64_t* rows_of_table(const Tensor& indices, int64_t rows) {
    const auto* values = static_cast<const int64_t*>(indices.const_data_ptr());
    for (int64_t i = 0; i < indices.numel(); ++i) {
        STD_TORCH_CHECK(values[i] >= 0 && values[i] < rows, "gpt2fast: index ", values[i],
                        " is outside an embedding of ", rows, " rows");
    }
    return values;
}

// tokens and positions hold one int64 for each row of the result.
Tensor embedding(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) {
    Tensor out = torch::stable::new_empty(wte, {tokens.numel(), wte.size(1)});
    const gpt2fast::Embedding args{rows_of_table(tokens, wte.size(0)),
                                   rows_of_table(positions, wpe.size(0)),
                                   wte.const_data_ptr(),
                                   wpe.const_data_ptr(),
                                   out.mutable_data_ptr(),
                                   wte.size(1),
                                   dtype_of(wte)};
    parallel(tokens.numel(), wte.size(1),
             [&](int64_t begin, int64_t end) { kernels().embedding(args, begin, end); });
    return out;
}

// The gradient of a table of `rows` rows from that of its look-ups.
Tensor embedding_backward(Tensor grad, Tensor indices, int64_t rows) {
    const int64_t* values = rows_of_table(indices, rows);
    const int64_t count = indices.numel();
    std::vector<int64_t> starts(size_t(rows) + 1), order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ++starts[size_t(values[i]) + 1];
    for (size_t row = 0; row < size_t(rows); ++row) starts[row + 1] += starts[row];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[size_t(next[size_t(values[i])]++)] = i;
    Tensor out = torch::stable::new_empty(grad, {rows, grad.size(1)});
    const gpt2fast::EmbeddingBackward args{grad.const_data_ptr(), starts.data(), order.data(),
                                           out.mutable_data_ptr(), grad.size(1), grad.stride(0),
                                           dtype_of(grad)};
    parallel(rows, grad.size(1),
             [&](int64_t begin, int64_t end) { kernels().embedding_backward(args, begin, end); });
    return out;
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

gpt2fast::CacheView view(const Tensor& cache, const std::optional<Tensor>& scales) {
    gpt2fast::CacheView out{cache.mutable_data_ptr(), cache.stride(0), cache.stride(1),
                            cache.stride(2), nullptr, 0, 0, 0};
    if (scales) {
        out.scales = static_cast<float*>(scales->mutable_data_ptr());
        out.scale_layer_stride = scales->stride(0);
        out.scale_row_stride = scales->stride(1);
        out.scale_entry_stride = scales->stride(2);
    }
    return out;
}

// A contiguous int64 tensor whose values lie in [low, high].
const int64_t* integers(const Tensor& x, const char* name, int64_t size, int64_t low,
                        int64_t high) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.is_contiguous() &&
                        x.numel() == size,
                    "gpt2fast: ", name, " must be a contiguous int64 tensor of ", size, " elements");
    const auto* values = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t i = 0; i < size; ++i) {
        STD_TORCH_CHECK(values[i] >= low && values[i] <= high, "gpt2fast: ", name, "[", i,
                        "] = ", values[i], " is not in ", low, " .. ", high);
    }
    return values;
}

Tensor packed_step(Tensor arena, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k_scales,
                   std::optional<Tensor> v_scales, Tensor tokens, Tensor positions, Tensor starts,
                   Tensor rows, Tensor lengths, Tensor output_tokens) {
    const auto* model = static_cast<const gpt2fast::PackedModel*>(arena.const_data_ptr());
    STD_TORCH_CHECK(arena.numel() >= int64_t(sizeof *model) &&
                        model->magic == gpt2fast::packed_magic && model->size == arena.numel(),
                    "gpt2fast: these are not packed weights");
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        STD_TORCH_CHECK(cache->dim() == 5 && cache->size(0) == model->layers &&
                            cache->size(3) == model->heads && cache->size(4) == model->head_dim &&
                            cache->stride(4) == 1 && cache->stride(3) == model->head_dim,
                        "gpt2fast: caches must be (", model->layers, ", rows, entries, ",
                        model->heads, ", ", model->head_dim, "), the last two contiguous");
    }
    STD_TORCH_CHECK((dtype_of(k_cache) == DType::int8) == k_scales.has_value() &&
                        k_scales.has_value() == v_scales.has_value() &&
                        v_cache.scalar_type() == k_cache.scalar_type(),
                    "gpt2fast: int8 caches, and only they, come with scales");
    gpt2fast::StepArgs args{};
    args.model = model;
    args.k_cache = view(k_cache, k_scales);
    args.v_cache = view(v_cache, v_scales);
    args.cache_dtype = dtype_of(k_cache);
    args.sequences = rows.numel();
    args.tokens = tokens.numel();
    args.outputs = output_tokens.numel();
    args.starts = integers(starts, "starts", args.sequences + 1, 0, args.tokens);
    args.rows = integers(rows, "rows", args.sequences, 0, k_cache.size(1) - 1);
    args.lengths = integers(lengths, "lengths", args.sequences, 0, k_cache.size(2) - 1);
    args.token_ids = integers(tokens, "tokens", args.tokens, 0, model->vocab - 1);
    args.positions = integers(positions, "positions", args.tokens, 0, model->positions - 1);
    args.output_tokens =
        integers(output_tokens, "output_tokens", args.outputs, 0, args.tokens - 1);
    STD_TORCH_CHECK(args.starts[0] == 0 && args.starts[args.sequences] == args.tokens,
                    "gpt2fast: starts must lead from 0 to ", args.tokens);
    for (int64_t i = 0; i < args.sequences; ++i) {
        const int64_t count = args.starts[i + 1] - args.starts[i];
        STD_TORCH_CHECK(count > 0 && args.lengths[i] + count <= k_cache.size(2), "gpt2fast: row ",
                        args.rows[i], " holds ", args.lengths[i], " of at most ", k_cache.size(2),
                        " entries; ", count, " more do not fit");
    }
    Tensor logits =
        torch::stable::new_empty(arena, {args.outputs, model->vocab}, ScalarType::Float);
    args.logits = static_cast<float*>(logits.mutable_data_ptr());
    const int team = threads();
    const int64_t bytes = (kernels().step_workspace(args, team) + 63) / 64 * 64;
    std::unique_ptr<void, Free> workspace(std::aligned_alloc(64, size_t(bytes)));
    STD_TORCH_CHECK(workspace != nullptr, "gpt2fast: no memory for a step of ", args.tokens,
                    " tokens: ", bytes, " bytes");
    args.workspace = static_cast<uint8_t*>(workspace.get());
    gpt2fast::run_team(team, [&](gpt2fast::Member& member) { kernels().step(args, member); });
    return logits;
}

// Changes, in all likelihood, whenever a byte of the contiguous tensors does.
int64_t fingerprint(std::vector<Tensor> tensors) {
    constexpr int64_t chunk = 1 << 20;
    std::vector<std::pair<const uint8_t*, int64_t>> chunks;
    for (const Tensor& x : tensors) {
        STD_TORCH_CHECK(x.is_contiguous(), "gpt2fast: fingerprint needs contiguous tensors");
        const auto* data = static_cast<const uint8_t*>(x.const_data_ptr());
        const int64_t bytes = x.numel() * int64_t(x.element_size());
        for (int64_t i = 0; i < bytes; i += chunk) {
            chunks.emplace_back(data + i, std::min(chunk, bytes - i));
        }
    }
    std::vector<uint64_t> parts(chunks.size());
    gpt2fast::run_team(threads(), [&](gpt2fast::Member& member) {
        member.for_each(int64_t(chunks.size()), [&](int64_t i) {
            parts[size_t(i)] =
                gpt2fast::fingerprint(chunks[size_t(i)].first, chunks[size_t(i)].second);
        });
    });
    return int64_t(gpt2fast::fingerprint(reinterpret_cast<const uint8_t*>(parts.data()),
                                         int64_t(parts.size() * sizeof(uint64_t))));
}

// A (batch, time, heads, head size) tensor whose last dimension is contiguous.
gpt2fast::Heads heads_of(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && (x.size(3) == 1 || x.stride(3) == 1), "gpt2fast: ", name,
                    " must have four dimensions, the last contiguous");
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// int64 values of a vector, checked to lie in [low, high]; `copy` holds them where they are strided.
const int64_t* checked(const Tensor& x, const char* name, int64_t size, int64_t low, int64_t high,
                       std::vector<int64_t>& copy) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.size(0) == size,
                    "gpt2fast: ", name, " must be an int64 vector of ", size, " elements");
    const auto* values = static_cast<const int64_t*>(x.const_data_ptr());
    const int64_t stride = x.stride(0);
    if (stride != 1) copy.resize(size_t(size));
    for (int64_t i = 0; i < size; ++i) {
        const int64_t value = values[i * stride];
        STD_TORCH_CHECK(value >= low && value <= high, "gpt2fast: ", name, "[", i, "] = ", value,
                        " is not in ", low, " .. ", high);
        if (stride != 1) copy[size_t(i)] = value;
    }
    return stride == 1 ? values : copy.data();
}

Tensor attention_with_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                            double scale) {
    gpt2fast::CachedAttention args{};
    args.q = heads_of(q, "q");
    args.k = heads_of(k_cache, "k_cache");
    args.v = heads_of(v_cache, "v_cache");
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.head_dim = q.size(3);
    args.entries = k_cache.size(1);
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        STD_TORCH_CHECK(cache->size(0) == args.batch && cache->size(1) == args.entries &&
                            cache->size(2) == args.heads && cache->size(3) == args.head_dim &&
                            cache->scalar_type() == k_cache.scalar_type(),
                        "gpt2fast: caches must be (", args.batch, ", entries, ", args.heads, ", ",
                        args.head_dim, ") and of one dtype");
    }
    std::vector<int64_t> copy;
    args.lengths = checked(lengths, "lengths", args.batch, 0, args.entries, copy);
    args.scale = float(scale);
    args.dtype = dtype_of(q);
    args.cache_dtype = dtype_of(k_cache);
    Tensor out = torch::stable::new_empty(q, q.sizes());
    args.out = out.mutable_data_ptr();
    int64_t longest = 0;
    for (int64_t i = 0; i < args.batch; ++i) longest = std::max(longest, args.lengths[i]);
    const int64_t block = std::min(args.time, gpt2fast::attention_queries);
    const int64_t blocks =
        (args.time + gpt2fast::attention_queries - 1) / gpt2fast::attention_queries;
    parallel(args.batch * blocks * args.heads,
             block * (longest + args.time) * args.head_dim,
             [&](int64_t begin, int64_t end) { kernels().cached_attention(args, begin, end); });
    return out;
}

void append_to_cache(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths,
                     std::optional<Tensor> counts) {
    gpt2fast::AppendToCache args{};
    const int64_t batch = k.size(0), entries = k_cache.size(1);
    args.time = k.size(1);
    args.heads = k.size(2);
    args.head_dim = k.size(3);
    args.dtype = dtype_of(k);
    args.cache_dtype = dtype_of(k_cache);
    std::vector<int64_t> lengths_copy, counts_copy;
    args.lengths = checked(lengths, "lengths", batch, 0, entries, lengths_copy);
    if (counts) {
        constexpr int64_t most = std::numeric_limits<int64_t>::max();
        args.counts = checked(*counts, "counts", batch, -most - 1, most, counts_copy);
    }
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t count = args.counts ? std::min(args.counts[row], args.time) : args.time;
        STD_TORCH_CHECK(args.lengths[row] + std::max<int64_t>(0, count) <= entries,
                        "gpt2fast: row ", row, " holds ", args.lengths[row], " of at most ",
                        entries, " entries; ", count, " more do not fit");
    }
    for (const auto& [from, cache] : {std::pair(&k, &k_cache), std::pair(&v, &v_cache)}) {
        STD_TORCH_CHECK(from->size(0) == batch && from->size(1) == args.time &&
                            from->size(2) == args.heads && from->size(3) == args.head_dim &&
                            from->scalar_type() == k.scalar_type() && cache->size(0) == batch &&
                            cache->size(1) == entries && cache->size(2) == args.heads &&
                            cache->size(3) == args.head_dim &&
                            cache->scalar_type() == k_cache.scalar_type(),
                        "gpt2fast: k and v must be alike, and so must the caches; of their sizes "
                        "only the second may differ");
        args.from = heads_of(*from, "k and v");
        heads_of(*cache, "caches");
        args.cache = cache->mutable_data_ptr();
        args.row_stride = cache->stride(0);
        args.entry_stride = cache->stride(1);
        args.head_stride = cache->stride(2);
        parallel(batch * args.time, args.heads * args.head_dim,
                 [&](int64_t begin, int64_t end) { kernels().append_to_cache(args, begin, end); });
    }
}

void reorder_cache(Tensor k_cache, Tensor v_cache, Tensor rows) {
    STD_TORCH_CHECK(k_cache.size(0) == v_cache.size(0), "gpt2fast: caches must have as many rows");
    const int64_t all = k_cache.size(0), count = rows.numel();
    STD_TORCH_CHECK(count <= all, "gpt2fast: ", count, " rows do not fit a cache of ", all);
    std::vector<int64_t> copy;
    const int64_t* from = checked(rows, "rows", count, 0, all - 1, copy);
    const std::vector<gpt2fast::RowCopy> plan = gpt2fast::row_copies(from, count, all);
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        heads_of(*cache, "caches");
        const int64_t size = int64_t(cache->element_size());
        gpt2fast::ReorderCache args{};
        args.cache = static_cast<uint8_t*>(cache->mutable_data_ptr());
        args.plan = plan.data();
        args.steps = int64_t(plan.size());
        args.row_stride = cache->stride(0) * size;
        args.entry_stride = cache->stride(1) * size;
        args.head_stride = cache->stride(2) * size;
        args.head_bytes = cache->size(3) * size;
        args.heads = cache->size(2);
        parallel(cache->size(1), args.steps * args.heads * args.head_bytes / 4,
                 [&](int64_t begin, int64_t end) { kernels().reorder_cache(args, begin, end); });
    }
}

void release_rows(Tensor lengths, Tensor rows) {
    STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1,
                    "gpt2fast: lengths must be an int64 vector");
    std::vector<int64_t> copy;
    const int64_t* released =
        checked(rows, "rows", rows.numel(), 0, lengths.size(0) - 1, copy);
    auto* values = static_cast<int64_t*>(lengths.mutable_data_ptr());
    for (int64_t i = 0; i < rows.numel(); ++i) values[released[i] * lengths.stride(0)] = 0;
}

Tensor sample(Tensor logits, Tensor history, std::optional<Tensor> uniform, double temperature,
              int64_t top_k, double top_p, double min_p, double repetition_penalty,
              int64_t no_repeat_ngram_size) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 &&
                        (logits.size(1) == 1 || logits.stride(1) == 1),
                    "gpt2fast: logits must be (rows, vocab), the last contiguous");
    const int64_t rows = logits.size(0);
    gpt2fast::Sample args{};
    args.logits = logits.const_data_ptr();
    args.vocab = logits.size(1);
    args.logits_stride = logits.stride(0);
    args.dtype = dtype_of(logits);
    if (repetition_penalty != 1.0 || no_repeat_ngram_size > 0) {
        STD_TORCH_CHECK(history.scalar_type() == ScalarType::Long && history.dim() == 2 &&
                            history.size(0) == rows,
                        "gpt2fast: history must be int64 (", rows, ", tokens)");
        args.history = static_cast<const int64_t*>(history.const_data_ptr());
        args.history_length = history.size(1);
        args.history_stride = history.stride(0);
        args.history_step = history.stride(1);
    }
    if (uniform) {
        STD_TORCH_CHECK(uniform->scalar_type() == ScalarType::Float && uniform->dim() == 1 &&
                            uniform->size(0) == rows,
                        "gpt2fast: uniform must be float32 (", rows, ",)");
        args.uniform = static_cast<const float*>(uniform->const_data_ptr());
        args.uniform_stride = uniform->stride(0);
    }
    args.temperature = float(temperature);
    args.top_k = top_k;
    args.top_p = top_p;
    args.min_p = float(min_p);
    args.repetition_penalty = float(repetition_penalty);
    args.no_repeat_ngram_size = no_repeat_ngram_size;
    Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
    args.out = static_cast<int64_t*>(out.mutable_data_ptr());

    // The team, not torch's threads: those would spin on, into the model's next step.
    constexpr int64_t worthwhile = 32768;  // elements for which a second thread pays
    const int team = rows * args.vocab < worthwhile ? 1 : int(std::min<int64_t>(rows, threads()));
    const int64_t bytes = (kernels().sample_workspace(args) + 63) / 64 * 64;
    // Kept between steps: fresh memory of this size would be mapped and cleared for each.
    thread_local std::vector<uint8_t> workspace;
    if (workspace.size() < size_t(bytes * team)) workspace.resize(size_t(bytes * team));
    uint8_t* const first = workspace.data();
    if (team == 1) {
        kernels().sample(args, 0, rows, first);
    } else {
        gpt2fast::run_team(team, [&](gpt2fast::Member& member) {
            member.for_each(rows, [&](int64_t row) {
                kernels().sample(args, row, row + 1, first + bytes * member.index());
            });
        });
    }
    return out;
}

// The instruction set whose kernels run.
std::string isa() { return kernels().name; }

// Bytes per second, the median of `repeats` passes.
double read_bandwidth(int64_t threads, int64_t bytes, int64_t repeats) {
    STD_TORCH_CHECK(threads > 0 && bytes > 0 && repeats > 0, "gpt2fast: nothing to read");
    return gpt2fast::read_bandwidth(int(threads), size_t(bytes), int(repeats))[repeats / 2];
}

}  // namespace

STABLE_TORCH_LIBRARY(gpt2fast_native, m) {
    m.def("isa() -> str");
    m.def("read_bandwidth(int threads, int bytes, int repeats) -> float");
    m.def("fingerprint(Tensor[] tensors) -> int");
    m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
    m.def(
        "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor(a!) grad_x, "
        "Tensor(b!)? activated) -> Tensor");
    m.def("sum_rows(Tensor x) -> Tensor");
    m.def(
        "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "layer_norm_backward(Tensor grad, Tensor? grad_summed, Tensor summed, Tensor mean, "
        "Tensor rstd, Tensor weight) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? visible, float dropout, "
        "int seed) -> (Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "float scale, Tensor? visible, float dropout, int seed) -> (Tensor, Tensor, Tensor)");
    m.def(
        "cross_entropy(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, int ignore_index, "
        "float factor, bool differentiate) -> ()");
    m.def("accumulate(Tensor(a!) sum, Tensor x) -> ()");
    m.def(
        "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, int step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay) -> ()");
    m.def("embedding(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) -> Tensor");
    m.def("embedding_backward(Tensor grad, Tensor indices, int rows) -> Tensor");
    m.def(
        "attention_with_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
        "float scale) -> Tensor");
    m.def(
        "append_to_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor lengths, Tensor? counts) -> ()");
    m.def("reorder_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows) -> ()");
    m.def("release_rows(Tensor(a!) lengths, Tensor rows) -> ()");
    m.def(
        "sample(Tensor logits, Tensor history, Tensor? uniform, float temperature, int top_k, "
        "float top_p, float min_p, float repetition_penalty, int no_repeat_ngram_size) -> Tensor");
    m.def(
        "packed_step(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
        "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor starts, Tensor rows, "
        "Tensor lengths, Tensor output_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&isa));
    m.impl("read_bandwidth", TORCH_BOX(&read_bandwidth));
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CPU, m) {
    m.impl("fingerprint", TORCH_BOX(&fingerprint));
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
    m.impl("sum_rows", TORCH_BOX(&sum_rows));
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
    m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
    m.impl("accumulate", TORCH_BOX(&accumulate));
    m.impl("adamw", TORCH_BOX(&adamw));
    m.impl("embedding", TORCH_BOX(&embedding));
    m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
    m.impl("packed_step", TORCH_BOX(&packed_step));
    m.impl("attention_with_cache", TORCH_BOX(&attention_with_cache));
    m.impl("append_to_cache", TORCH_BOX(&append_to_cache));
    m.impl("reorder_cache", TORCH_BOX(&reorder_cache));
    m.impl("release_rows", TORCH_BOX(&release_rows));
    m.impl("sample", TORCH_BOX(&sample));
}
