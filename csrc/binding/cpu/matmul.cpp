// Matrix products of training, cut into blocks that the kernels take and spread over torch's
// threads.
#include "tensors.h"

#include <memory>
#include <mutex>

namespace gpt2fast::binding {
namespace {

// Words of the inputs that are summed in one go: a panel of so many is a fraction of a core's own
// cache. Sums in bfloat16 cannot be continued, so those have more room.
constexpr int64_t most_words = 1024, most_narrow_words = 1536;
// Words of packed rows: they are to stay in the shared cache while the panels pass.
constexpr int64_t most_packed = int64_t(2) << 20;

// Memory for packed rows, kept for the next product: fresh pages would cost more than packing.
class Workspace {
public:
    explicit Workspace(int64_t bytes) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            std::swap(memory_, kept_);
            std::swap(size_, kept_size_);
        }
        if (size_ < bytes) {
            memory_.reset();
            memory_.reset(new uint8_t[size_t(bytes)]);
            size_ = bytes;
        }
    }
    ~Workspace() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (size_ > kept_size_) {
            std::swap(memory_, kept_);
            std::swap(size_, kept_size_);
        }
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* aligned() const {
        const auto at = reinterpret_cast<uintptr_t>(memory_.get());
        return reinterpret_cast<float*>((at + 63) / 64 * 64);
    }

private:
    static std::mutex mutex_;
    static std::unique_ptr<uint8_t[]> kept_;
    static int64_t kept_size_;

    std::unique_ptr<uint8_t[]> memory_;
    int64_t size_ = 0;
};

std::mutex Workspace::mutex_;
std::unique_ptr<uint8_t[]> Workspace::kept_;
int64_t Workspace::kept_size_ = 0;

// A matrix whose lines are its rows (of the left factor) or its columns (of the right one).
View lines_of(const Tensor& x, int line, int input) {
    check_sizes(x, "a factor", {-1, -1});
    GPT2FAST_CHECK(x.stride(0) == 1 || x.stride(1) == 1,
                   "a product reads matrices of contiguous rows or columns");
    return {x.const_data_ptr(), x.stride(line), x.stride(input), float_dtype_of(x)};
}

View from(View view, int64_t line, int64_t input) {
    const int64_t elements = line * view.line_stride + input * view.input_stride;
    view.data = static_cast<const uint8_t*>(view.data) + elements * size_of(view.dtype);
    return view;
}

// True if the kernels here multiply float32, or bfloat16 if `narrow`, faster than torch's do;
// `awkward`: into rows of results that are long, or not aligned as the one before.
bool multiplies(bool narrow, bool awkward) { return kernels().matmul_pays(narrow, awkward); }

void multiply(Matmul args) {
    args.plan = kernels().matmul_plan(args, int(torch::stable::get_num_threads()));
    const Workspace workspace(args.plan.workspace);
    args.packed = workspace.aligned();
    spread(kernels().matmul_pack, args, args.plan.tiles, args.inputs * 16);
    // Every item is large enough for a thread.
    spread(kernels().matmul, args, args.plan.parts * args.plan.groups, args.inputs * args.rows);
}

// out = (out if add else 0) + a b + bias, multiplied in bfloat16 if `narrow`; the sums of b's
// columns go to column_sums. Rows of out are contiguous; bias and column_sums are float32.
void matmul(Tensor a, Tensor b, std::optional<Tensor> bias, Tensor out, bool add, bool narrow,
            std::optional<Tensor> column_sums) {
    const View whole_a = lines_of(a, 0, 1), whole_b = lines_of(b, 1, 0);
    const int64_t rows = a.size(0), inputs = a.size(1), columns = b.size(1);
    check_rows(out, "out", {rows, columns});
    float_dtype_of(out);
    if (bias) check_contiguous(*bias, "bias", {columns});
    if (bias) check_floats(*bias, "bias");
    if (column_sums) check_contiguous(*column_sums, "column_sums", {columns});
    if (column_sums) check_floats(*column_sums, "column_sums");
    GPT2FAST_CHECK(rows > 0 && inputs > 0 && columns > 0, "a product needs at least one element");
    const bool wide = dtype_of(out) == DType::float32;
    GPT2FAST_CHECK(b.size(0) == inputs, "the sizes of a product do not fit: ", inputs, " and ",
                   b.size(0), " inputs");
    GPT2FAST_CHECK(wide || !add, "a sum in bfloat16 is not continued");
    GPT2FAST_CHECK(narrow || (dtype_of(a) == DType::float32 && dtype_of(b) == DType::float32),
                   "bfloat16 is multiplied as such");
    const int64_t per_word = narrow ? 2 : 1;
    const int64_t most = per_word * (wide ? most_words : most_narrow_words);
    const int64_t blocks = std::max<int64_t>(1, ceil_div(inputs, most));
    std::optional<Tensor> sums;  // of all blocks but the last, where out cannot hold them
    if (blocks > 1 && !wide) sums = floats(out, {rows, columns});
    const Tensor& continued = sums ? *sums : out;

    Matmul args{};
    args.columns = columns;
    args.format = narrow ? Format::bfloat16 : Format::float32;
    args.before_stride = continued.stride(0);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = inputs * block / blocks / per_word * per_word;
        const bool last = block == blocks - 1;
        args.inputs = (last ? inputs : inputs * (block + 1) / blocks / per_word * per_word) - first;
        args.b = from(whole_b, 0, first);
        args.bias = last && bias ? floats_of(*bias) : nullptr;
        args.add_to_sums = block > 0;
        const Tensor& to = last ? out : continued;
        args.out_stride = to.stride(0);
        args.out_dtype = dtype_of(to);
        // Many rows are taken block by block.
        const int64_t fit = std::max<int64_t>(256, most_packed * per_word / args.inputs);
        const int64_t turns = ceil_div(rows, fit);
        for (int64_t turn = 0; turn < turns; ++turn) {
            const int64_t row = rows * turn / turns;
            args.rows = rows * (turn + 1) / turns - row;
            args.a = from(whole_a, row, first);
            args.out = static_cast<uint8_t*>(to.mutable_data_ptr()) +
                       row * args.out_stride * size_of(args.out_dtype);
            args.before =
                block > 0 || add ? floats_of(continued) + row * args.before_stride : nullptr;
            args.column_sums = turn == 0 && column_sums ? floats_of(*column_sums) : nullptr;
            multiply(args);
        }
    }
}

}  // namespace

GPT2FAST_OP_EVERYWHERE(multiplies, "narrow, awkward");
GPT2FAST_OP(matmul, "a, b, bias, out!, add, narrow, column_sums!");

}  // namespace gpt2fast::binding
