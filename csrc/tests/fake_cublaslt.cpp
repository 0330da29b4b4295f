// A cuBLASLt for tests, in memory of the host: tests/ops/test_cublaslt.py compiles it into a shared
// library and gives that to launch/cublaslt.cpp in place of NVIDIA's.
//
// It is written after the comments of NVIDIA's cublasLt.h and the table of cublasLtMatmul in the
// cuBLAS documentation, and is strict about:
//   - attributes: known ones only, of exactly their size
//   - D = op(A) op(B): column-major layouts whose sizes agree, ld >= rows, beta = 0
//   - types: 16-bit A, B, D, bias and aux of one type, CUBLAS_COMPUTE_32F with a CUDA_R_32F scale
//   - epilogues: BIAS, GELU_BIAS, GELU_AUX_BIAS, DGELU_BGRAD, BGRADA; the bias has D's rows; aux
//     has a pointer and an ld that is a multiple of 8 and at least D's rows
//   - an algorithm: only for the problem it was found for, with the workspace it asks for (aligned
//     to 256 bytes), and with pointers as aligned as the preference (256 bytes unless set) and, for
//     bias and aux, the pointers in the descriptor promised
//   - operands that overlap what is written
//   - the workspace, which it overwrites
// It computes in double and rounds once; GELU is the tanh form, of what is not rounded yet.
//
// It cannot tell which problems the real library has kernels for (GPT2FAST_FAKE_REFUSES names
// epilogues, by number, that this one has none for), on which GPUs and how fast; its rounding, of
// GELU and sums above all, and whether its GELU is the tanh form; alignments that it asks for
// without saying; streams and CUDA graphs; anything about device memory.
//
//   fake_cublaslt_log()      a line for each product, "refused: ..." where something was wrong
//   fake_cublaslt_living()   descriptors that were created and not destroyed
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Attributes {
    std::map<int, std::vector<unsigned char>> values;

    template <typename T>
    T get(int attribute, T otherwise) const {
        const auto found = values.find(attribute);
        if (found == values.end()) return otherwise;
        T value;
        std::memcpy(&value, found->second.data(), sizeof value);
        return value;
    }
};

struct Operation : Attributes {
    cublasComputeType_t compute;
    cudaDataType_t scale;
};

struct Layout {
    cudaDataType_t type;
    int64_t rows, columns, leading;
};

struct Preference : Attributes {};

std::mutex mutex;
std::string text;
int living = 0;

cublasStatus_t refuse(cublasStatus_t status, const std::string& why) {
    const std::lock_guard<std::mutex> lock(mutex);
    text += "refused: " + why + "\n";
    return status;
}

cublasStatus_t invalid(const std::string& why) { return refuse(CUBLAS_STATUS_INVALID_VALUE, why); }

template <typename Ours, typename Theirs>
Ours& ours(Theirs* handle) {
    return *reinterpret_cast<Ours*>(handle);
}

template <typename Ours, typename Theirs>
cublasStatus_t create(Theirs** handle, Ours value) {
    *handle = reinterpret_cast<Theirs*>(new Ours(std::move(value)));
    const std::lock_guard<std::mutex> lock(mutex);
    ++living;
    return CUBLAS_STATUS_SUCCESS;
}

template <typename Ours, typename Theirs>
cublasStatus_t destroy(Theirs* handle) {
    delete reinterpret_cast<Ours*>(handle);
    const std::lock_guard<std::mutex> lock(mutex);
    --living;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t set(Attributes& attributes, const std::map<int, size_t>& sizes, int attribute,
                   const void* buffer, size_t bytes) {
    const auto known = sizes.find(attribute);
    if (known == sizes.end()) return invalid("attribute " + std::to_string(attribute));
    if (buffer == nullptr || bytes != known->second) {
        return invalid("attribute " + std::to_string(attribute) + " of " + std::to_string(bytes) +
                       " bytes");
    }
    const auto* from = static_cast<const unsigned char*>(buffer);
    attributes.values[attribute].assign(from, from + bytes);
    return CUBLAS_STATUS_SUCCESS;
}

uint64_t alignment_of(const void* pointer) {
    const uint64_t address = reinterpret_cast<uintptr_t>(pointer) | 256;
    return address & (~address + 1);
}

// The problem that an algorithm was found for, and what it relies on.
struct Problem {
    int64_t m, n, k;
    int32_t type, epilogue;
    bool transposed_a, transposed_b, has_aux, has_bias;
    int64_t leading_a, leading_b, leading_d, leading_aux;
    uint64_t bias_alignment, aux_alignment;

    std::string words() const {
        std::ostringstream out;
        out << "epilogue " << epilogue << " type " << type << ' ' << (transposed_a ? 'T' : 'N')
            << (transposed_b ? 'T' : 'N') << ' ' << m << 'x' << n << 'x' << k << " ld " << leading_a
            << ' ' << leading_b << ' ' << leading_d << " aux " << leading_aux;
        return out.str();
    }
};

struct Algorithm {
    uint64_t problem;
    uint64_t workspace;
    uint64_t alignment_a, alignment_b, alignment_d, bias_alignment, aux_alignment;
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t), "fits");

bool is_one_of(int epilogue, std::initializer_list<int> these) {
    for (const int each : these) {
        if (each == epilogue) return true;
    }
    return false;
}

cublasStatus_t understand(cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                          cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                          cublasLtMatrixLayout_t d, Problem& problem) {
    if (!operation || !a || !b || !c || !d) return invalid("a descriptor that is null");
    const auto& described = ours<Operation>(operation);
    const Layout &in_a = ours<Layout>(a), &in_b = ours<Layout>(b), &in_c = ours<Layout>(c),
                 &out = ours<Layout>(d);
    if (described.compute != CUBLAS_COMPUTE_32F || described.scale != CUDA_R_32F) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "compute type or scale type");
    }
    if (out.type != CUDA_R_16F && out.type != CUDA_R_16BF) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "type " + std::to_string(out.type));
    }
    for (const Layout& each : {in_a, in_b, in_c}) {
        if (each.type != out.type) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "mixed types");
    }
    for (const Layout& each : {in_a, in_b, in_c, out}) {
        if (each.rows < 1 || each.columns < 1 || each.leading < each.rows) {
            return invalid("a layout of " + std::to_string(each.rows) + " x " +
                           std::to_string(each.columns) + ", ld " + std::to_string(each.leading));
        }
        if (each.rows > INT32_MAX || each.columns > INT32_MAX) {
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "more than int32 rows or columns");
        }
    }
    const auto op_a = described.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_N);
    const auto op_b = described.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    if (!is_one_of(op_a, {CUBLAS_OP_N, CUBLAS_OP_T}) ||
        !is_one_of(op_b, {CUBLAS_OP_N, CUBLAS_OP_T})) {
        return invalid("an operation that is neither N nor T");
    }
    const bool transposed_a = op_a == CUBLAS_OP_T, transposed_b = op_b == CUBLAS_OP_T;
    const int64_t m = transposed_a ? in_a.columns : in_a.rows;
    const int64_t k = transposed_a ? in_a.rows : in_a.columns;
    const int64_t n = transposed_b ? in_b.rows : in_b.columns;
    if ((transposed_b ? in_b.columns : in_b.rows) != k || out.rows != m || out.columns != n ||
        in_c.rows != m || in_c.columns != n) {
        return invalid("sizes that do not agree");
    }
    const auto epilogue =
        int32_t(described.get<uint32_t>(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT));
    if (!is_one_of(epilogue, {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_BIAS,
                              CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU_BGRAD,
                              CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_DEFAULT})) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "epilogue " + std::to_string(epilogue));
    }
    const void* const bias = described.get<void*>(CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr);
    const auto bias_type = described.get<int32_t>(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, -1);
    const bool has_bias = epilogue != CUBLASLT_EPILOGUE_DEFAULT;
    if (has_bias && bias == nullptr) return invalid("an epilogue with a bias that is null");
    if (has_bias && bias_type != -1 && bias_type != int32_t(out.type)) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a bias of another type");
    }
    const bool has_aux =
        is_one_of(epilogue, {CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU_BGRAD});
    const void* const aux =
        described.get<void*>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, nullptr);
    const auto leading_aux = described.get<int64_t>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, 0);
    if (has_aux) {
        if (aux == nullptr) return invalid("an epilogue with an auxiliary matrix that is null");
        if (leading_aux % 8 != 0 || leading_aux < m) {
            return invalid("an auxiliary ld of " + std::to_string(leading_aux));
        }
    }
    problem = {m,
               n,
               k,
               int32_t(out.type),
               epilogue,
               transposed_a,
               transposed_b,
               has_aux,
               has_bias,
               in_a.leading,
               in_b.leading,
               out.leading,
               has_aux ? leading_aux : 0,
               has_bias ? alignment_of(bias) : 256,
               has_aux ? alignment_of(aux) : 256};
    return CUBLAS_STATUS_SUCCESS;
}

bool is_refused(int epilogue) {
    const char* const named = std::getenv("GPT2FAST_FAKE_REFUSES");
    std::istringstream list(named == nullptr ? "" : named);
    for (int each; list >> each;) {
        if (each == epilogue) return true;
    }
    return false;
}

double value_at(const void* data, int32_t type, int64_t index) {
    return type == CUDA_R_16BF ? __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index])
                               : __half2float(static_cast<const __half*>(data)[index]);
}

void store(void* data, int32_t type, int64_t index, double value) {
    if (type == CUDA_R_16BF) {
        static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(float(value));
    } else {
        static_cast<__half*>(data)[index] = __float2half_rn(float(value));
    }
}

const double slope = std::sqrt(2 / std::acos(-1.0));

double gelu(double z) { return z / 2 * (1 + std::tanh(slope * (z + 0.044715 * z * z * z))); }

double gelu_gradient(double z) {
    const double tanh = std::tanh(slope * (z + 0.044715 * z * z * z));
    return (1 + tanh) / 2 + z / 2 * (1 - tanh * tanh) * slope * (1 + 3 * 0.044715 * z * z);
}

struct Range {
    const char *begin, *end;
    Range(const void* data, int64_t elements)
        : begin(static_cast<const char*>(data)), end(begin + 2 * elements) {}
    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED const char* fake_cublaslt_log() {
    static std::string copy;
    const std::lock_guard<std::mutex> lock(mutex);
    copy = std::move(text);
    text.clear();
    return copy.c_str();
}

EXPORTED int fake_cublaslt_living() { return living; }

EXPORTED cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    static int only;
    *handle = reinterpret_cast<cublasLtHandle_t>(&only);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation,
                                                 cublasComputeType_t compute,
                                                 cudaDataType_t scale) {
    Operation made;
    made.compute = compute;
    made.scale = scale;
    return create(operation, made);
}

EXPORTED cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
    return destroy<Operation>(operation);
}

EXPORTED cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                                       cublasLtMatmulDescAttributes_t attribute,
                                                       const void* buffer, size_t bytes) {
    static const std::map<int, size_t> sizes = {
        {CUBLASLT_MATMUL_DESC_TRANSA, 4},          {CUBLASLT_MATMUL_DESC_TRANSB, 4},
        {CUBLASLT_MATMUL_DESC_EPILOGUE, 4},        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, 8},
        {CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, 4},  {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, 8},
        {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, 8},
    };
    return set(ours<Operation>(operation), sizes, attribute, buffer, bytes);
}

EXPORTED cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout,
                                                   cudaDataType type, uint64_t rows, uint64_t cols,
                                                   int64_t ld) {
    return create(layout, Layout{type, int64_t(rows), int64_t(cols), ld});
}

EXPORTED cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return destroy<Layout>(layout);
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return create(preference, Preference{});
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy<Preference>(preference);
}

EXPORTED cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
    const void* buffer, size_t bytes) {
    static const std::map<int, size_t> sizes = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 8},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 4},
    };
    return set(ours<Preference>(preference), sizes, attribute, buffer, bytes);
}

EXPORTED cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int requested, cublasLtMatmulHeuristicResult_t results[],
    int* returned) {
    if (handle == nullptr) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if (preference == nullptr || requested < 1) return invalid("nothing was asked for");
    *returned = 0;
    Problem problem;
    const cublasStatus_t status = understand(operation, a, b, c, d, problem);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (is_refused(problem.epilogue)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const auto& wishes = ours<Preference>(preference);
    const auto room = wishes.get<uint64_t>(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 0);
    const Algorithm algorithm = {
        std::hash<std::string>{}(problem.words()),
        room < 4096 ? 0u : 4096u,
        wishes.get<uint32_t>(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 256),
        wishes.get<uint32_t>(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 256),
        wishes.get<uint32_t>(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 256),
        problem.bias_alignment,
        problem.aux_alignment,
    };
    results[0] = {};
    std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
    results[0].workspaceSize = algorithm.workspace;
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *returned = 1;
    const std::lock_guard<std::mutex> lock(mutex);
    text += "planned " + problem.words() + "\n";
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                       const void* alpha, const void* a,
                                       cublasLtMatrixLayout_t a_layout, const void* b,
                                       cublasLtMatrixLayout_t b_layout, const void* beta,
                                       const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                       cublasLtMatrixLayout_t d_layout,
                                       const cublasLtMatmulAlgo_t* chosen, void* workspace,
                                       size_t workspace_bytes, cudaStream_t) {
    if (handle == nullptr) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if (!alpha || !beta || !a || !b || !c || !d || !chosen) return invalid("a pointer is null");
    Problem problem;
    const cublasStatus_t status =
        understand(operation, a_layout, b_layout, c_layout, d_layout, problem);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    Algorithm algorithm;
    std::memcpy(&algorithm, chosen, sizeof algorithm);
    if (algorithm.problem != std::hash<std::string>{}(problem.words())) {
        return invalid("the algorithm of another problem");
    }
    if (algorithm.workspace > 0 && (workspace == nullptr || workspace_bytes < algorithm.workspace ||
                                    alignment_of(workspace) < 256)) {
        return invalid("the workspace");
    }
    if (alignment_of(a) < algorithm.alignment_a || alignment_of(b) < algorithm.alignment_b ||
        alignment_of(d) < algorithm.alignment_d ||
        problem.bias_alignment < algorithm.bias_alignment ||
        problem.aux_alignment < algorithm.aux_alignment) {
        return invalid("a pointer that is less aligned than the algorithm was told");
    }
    const float factor = *static_cast<const float*>(alpha);
    if (*static_cast<const float*>(beta) != 0.0f) return invalid("a beta that is not modeled");

    const auto& described = ours<Operation>(operation);
    void* const bias = described.get<void*>(CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr);
    void* const aux = described.get<void*>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, nullptr);
    const auto [m, n, k] = std::array<int64_t, 3>{problem.m, problem.n, problem.k};
    const int epilogue = problem.epilogue;
    const bool reads_bias = is_one_of(
        epilogue,
        {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS});
    const bool writes_aux = epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;

    const auto extent = [](int64_t rows, int64_t columns, int64_t leading) {
        return (columns - 1) * leading + rows;
    };
    const Range in_a(a, problem.transposed_a ? extent(k, m, problem.leading_a)
                                             : extent(m, k, problem.leading_a));
    const Range in_b(b, problem.transposed_b ? extent(n, k, problem.leading_b)
                                             : extent(k, n, problem.leading_b));
    std::vector<Range> reads = {in_a, in_b}, writes = {Range(d, extent(m, n, problem.leading_d))};
    if (problem.has_bias) (reads_bias ? reads : writes).emplace_back(bias, m);
    if (problem.has_aux) {
        (writes_aux ? writes : reads).emplace_back(aux, extent(m, n, problem.leading_aux));
    }
    writes.emplace_back(workspace, int64_t(algorithm.workspace / 2));
    for (size_t i = 0; i < writes.size(); ++i) {
        for (const Range& read : reads) {
            if (writes[i].overlaps(read)) return invalid("what is written overlaps what is read");
        }
        for (size_t j = 0; j < i; ++j) {
            if (writes[i].overlaps(writes[j])) return invalid("two results overlap");
        }
    }
    if (algorithm.workspace > 0) std::memset(workspace, 0xff, algorithm.workspace);

    const int32_t type = problem.type;
    const auto in_op_a = [&](int64_t i, int64_t l) {
        return value_at(
            a, type, problem.transposed_a ? l + i * problem.leading_a : i + l * problem.leading_a);
    };
    const auto in_op_b = [&](int64_t l, int64_t j) {
        return value_at(
            b, type, problem.transposed_b ? j + l * problem.leading_b : l + j * problem.leading_b);
    };
    std::vector<double> sums(m, 0.0);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
            double value = 0;
            for (int64_t l = 0; l < k; ++l) value += in_op_a(i, l) * in_op_b(l, j);
            value *= factor;
            if (reads_bias) value += value_at(bias, type, i);
            if (writes_aux) store(aux, type, i + j * problem.leading_aux, value);
            if (epilogue == CUBLASLT_EPILOGUE_GELU_BIAS || writes_aux) value = gelu(value);
            if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD) {
                value *= gelu_gradient(value_at(aux, type, i + j * problem.leading_aux));
                sums[i] += value;
            }
            store(d, type, i + j * problem.leading_d, value);
        }
    }
    if (epilogue == CUBLASLT_EPILOGUE_BGRADA) {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t l = 0; l < k; ++l) sums[i] += in_op_a(i, l);
        }
    }
    if (problem.has_bias && !reads_bias) {
        for (int64_t i = 0; i < m; ++i) store(bias, type, i, sums[i]);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    text += "ran " + problem.words() + "\n";
    return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
