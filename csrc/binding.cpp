// The only file that sees torch: hands tensors to the kernels as pointers and sizes.
//
// Built against torch's stable ABI, so that one binary serves many versions of torch and of Python.
// The ops live in the namespace gpt2fast_native; gpt2fast/ops decides when they run and has
// checked what they are given.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "cpu/kernels.h"
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

const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

Tensor packed_step(Tensor arena, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k_scales,
                   std::optional<Tensor> v_scales, Tensor tokens, Tensor positions, Tensor starts,
                   Tensor rows, Tensor lengths, Tensor output_tokens) {
    const auto* model = static_cast<const gpt2fast::PackedModel*>(arena.const_data_ptr());
    STD_TORCH_CHECK(arena.numel() >= int64_t(sizeof *model) &&
                        model->magic == gpt2fast::packed_magic && model->size == arena.numel(),
                    "gpt2fast: these are not packed weights");
    gpt2fast::StepArgs args{};
    args.model = model;
    args.k_cache = view(k_cache, k_scales);
    args.v_cache = view(v_cache, v_scales);
    args.cache_dtype = dtype_of(k_cache);
    args.sequences = rows.numel();
    args.starts = integers(starts);
    args.rows = integers(rows);
    args.lengths = integers(lengths);
    args.tokens = tokens.numel();
    args.token_ids = integers(tokens);
    args.positions = integers(positions);
    args.outputs = output_tokens.numel();
    args.output_tokens = integers(output_tokens);
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

// The instruction set whose kernels run.
std::string isa() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(gpt2fast_native, m) {
    m.def("isa() -> str");
    m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
    m.def(
        "packed_step(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
        "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor starts, Tensor rows, "
        "Tensor lengths, Tensor output_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&isa));
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CPU, m) {
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
    m.impl("packed_step", TORCH_BOX(&packed_step));
}
