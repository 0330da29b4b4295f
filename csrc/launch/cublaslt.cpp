#include "cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace gpt2fast::launch {
namespace {

// The functions of the library, with the types that its header declares.
struct CublasLt {
    std::string missing;
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtMatmulDescCreate) create_operation;
    decltype(&cublasLtMatmulDescDestroy) destroy_operation;
    decltype(&cublasLtMatmulDescSetAttribute) set_operation;
    decltype(&cublasLtMatrixLayoutCreate) create_layout;
    decltype(&cublasLtMatrixLayoutDestroy) destroy_layout;
    decltype(&cublasLtMatmulPreferenceCreate) create_preference;
    decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference;
    decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
    decltype(&cublasLtMatmulAlgoGetHeuristic) find_algorithm;
    decltype(&cublasLtMatmul) multiply;
};

const char* named_library() {
    const char* const named = std::getenv("GPT2FAST_CUBLASLT_LIBRARY");
    return named != nullptr && *named != 0 ? named : nullptr;
}

// The library that was named, else the one that torch has loaded, else any that is found.
void* open_library() {
    if (const char* const named = named_library()) return dlopen(named, RTLD_LAZY | RTLD_LOCAL);
    constexpr const char* names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    for (const int only_loaded : {RTLD_NOLOAD, 0}) {
        for (const char* name : names) {
            if (void* library = dlopen(name, RTLD_LAZY | RTLD_LOCAL | only_loaded)) return library;
        }
    }
    return nullptr;
}

CublasLt find_library() {
    CublasLt found{};
    void* const library = open_library();
    if (library == nullptr) {
        const char* const named = named_library();
        found.missing = named != nullptr
                            ? std::string("GPT2FAST_CUBLASLT_LIBRARY=") + named + " does not load"
                            : "there is no libcublasLt.so.13 or .12";
        return found;
    }
    const auto find = [&](auto& function, const char* name) {
        function =
            reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        if (function == nullptr) found.missing = std::string("cuBLASLt has no ") + name;
    };
    find(found.create, "cublasLtCreate");
    find(found.create_operation, "cublasLtMatmulDescCreate");
    find(found.destroy_operation, "cublasLtMatmulDescDestroy");
    find(found.set_operation, "cublasLtMatmulDescSetAttribute");
    find(found.create_layout, "cublasLtMatrixLayoutCreate");
    find(found.destroy_layout, "cublasLtMatrixLayoutDestroy");
    find(found.create_preference, "cublasLtMatmulPreferenceCreate");
    find(found.destroy_preference, "cublasLtMatmulPreferenceDestroy");
    find(found.set_preference, "cublasLtMatmulPreferenceSetAttribute");
    find(found.find_algorithm, "cublasLtMatmulAlgoGetHeuristic");
    find(found.multiply, "cublasLtMatmul");
    return found;
}

const CublasLt& cublaslt() {
    static const CublasLt library = find_library();
    return library;
}

void check(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        throw std::runtime_error(std::string("cuBLASLt: ") + what + " failed with status " +
                                 std::to_string(int(status)));
    }
}

// A descriptor, destroyed with its owner.
template <typename T>
class Owned {
public:
    explicit Owned(cublasStatus_t (*destroy)(T)) : destroy_(destroy) {}
    ~Owned() {
        if (handle_ != nullptr) destroy_(handle_);
    }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    T* put() { return &handle_; }
    operator T() const { return handle_; }

private:
    T handle_ = nullptr;
    cublasStatus_t (*destroy_)(T);
};

// cuBLASLt's matrices go column by column, so that it computes out^T = b^T a^T: its A is our b, its
// B our a, its m our n. `transposed` then says whether our matrix goes column by column as well.
struct Layout {
    bool transposed;
    int64_t rows, columns, leading;  // as cuBLASLt sees it
};

bool describe(const Operand& x, Layout& layout) {
    if (x.column_stride == 1 && (x.row_stride >= x.columns || x.rows == 1)) {
        layout = {false, x.columns, x.rows, x.rows == 1 ? x.columns : x.row_stride};
        return true;
    }
    if (x.row_stride == 1 && (x.column_stride >= x.rows || x.columns == 1)) {
        layout = {true, x.rows, x.columns, x.columns == 1 ? x.rows : x.column_stride};
        return true;
    }
    return false;
}

bool keeps_inner(const Matmul& matmul) {
    return matmul.inner != nullptr &&
           (matmul.epilogue == Epilogue::gelu_bias || matmul.epilogue == Epilogue::gelu_gradient);
}

uint32_t epilogue_of(const Matmul& matmul) {
    switch (matmul.epilogue) {
        case Epilogue::bias: return CUBLASLT_EPILOGUE_BIAS;
        case Epilogue::gelu_bias:
            return keeps_inner(matmul) ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
                                       : CUBLASLT_EPILOGUE_GELU_BIAS;
        case Epilogue::gelu_gradient: return CUBLASLT_EPILOGUE_DGELU_BGRAD;
        case Epilogue::column_sums: return CUBLASLT_EPILOGUE_BGRADA;
    }
    throw std::invalid_argument("no such epilogue");
}

// The largest power of two, 256 at most, that divides the address.
uint32_t alignment_of(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
    return uint32_t(address & (~address + 1));
}

constexpr uint32_t least_alignment = 16;  // bytes, of addresses and of strides

bool is_aligned(const void* pointer) { return alignment_of(pointer) >= least_alignment; }

struct Descriptors {
    Owned<cublasLtMatmulDesc_t> operation{cublaslt().destroy_operation};
    Owned<cublasLtMatrixLayout_t> a{cublaslt().destroy_layout};
    Owned<cublasLtMatrixLayout_t> b{cublaslt().destroy_layout};
    Owned<cublasLtMatrixLayout_t> out{cublaslt().destroy_layout};

    // a and b are cuBLASLt's.
    Descriptors(const Matmul& matmul, const Layout& a_layout, const Layout& b_layout) {
        const cudaDataType_t type = matmul.dtype == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_16F;
        check(cublaslt().create_operation(operation.put(), CUBLAS_COMPUTE_32F, CUDA_R_32F),
              "cublasLtMatmulDescCreate");
        set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t(a_layout.transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t(b_layout.transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(matmul));
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, matmul.bias);
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(type));
        const int64_t m = matmul.b.columns, n = matmul.a.rows;
        if (keeps_inner(matmul)) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, matmul.inner);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, m);
        }
        create(a, type, a_layout.rows, a_layout.columns, a_layout.leading);
        create(b, type, b_layout.rows, b_layout.columns, b_layout.leading);
        create(out, type, m, n, m);
    }

private:
    template <typename T>
    void set(cublasLtMatmulDescAttributes_t attribute, T value) {
        check(cublaslt().set_operation(operation, attribute, &value, sizeof value),
              "cublasLtMatmulDescSetAttribute");
    }

    static void create(Owned<cublasLtMatrixLayout_t>& layout, cudaDataType_t type, int64_t rows,
                       int64_t columns, int64_t leading) {
        check(cublaslt().create_layout(layout.put(), type, uint64_t(rows), uint64_t(columns),
                                       leading),
              "cublasLtMatrixLayoutCreate");
    }
};

bool is_suitable(const Matmul& matmul, Layout& a, Layout& b) {
    if (matmul.dtype != DType::float16 && matmul.dtype != DType::bfloat16) return false;
    if (!describe(matmul.b, a) || !describe(matmul.a, b)) return false;
    constexpr int64_t elements = least_alignment / 2;
    return a.leading % elements == 0 && b.leading % elements == 0 &&
           matmul.b.columns % elements == 0 && is_aligned(matmul.a.data) &&
           is_aligned(matmul.b.data) && is_aligned(matmul.out) && is_aligned(matmul.bias) &&
           is_aligned(matmul.inner);
}

// The workspace that cuBLASLt recommends on Hopper; it takes less where it needs less.
constexpr uint64_t most_workspace = 32 << 20;

bool ask_for_plan(cublasLtHandle_t handle, const Matmul& matmul, const Layout& a, const Layout& b,
                  MatmulPlan& plan) {
    const Descriptors described(matmul, a, b);
    Owned<cublasLtMatmulPreference_t> preference(cublaslt().destroy_preference);
    check(cublaslt().create_preference(preference.put()), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        check(cublaslt().set_preference(preference, attribute, &value, sizeof value),
              "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most_workspace);
    // Parts of a sum are added in float32: the others add in the output's 16 bits.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(matmul.b.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(matmul.a.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(matmul.out));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(matmul.out));
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status =
        cublaslt().find_algorithm(handle, described.operation, described.a, described.b,
                                  described.out, described.out, preference, 1, &best, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0 || best.state != CUBLAS_STATUS_SUCCESS) {
        return false;  // the caller uses torch then
    }
    static_assert(sizeof plan.algorithm == sizeof best.algo.data, "an algorithm is 64 bytes");
    std::copy(std::begin(best.algo.data), std::end(best.algo.data), plan.algorithm);
    plan.workspace_bytes = best.workspaceSize;
    return true;
}

std::mutex mutex;

// Called with the mutex held. Handles are never destroyed: CUDA may have ended before we do.
cublasLtHandle_t handle_of(int device) {
    static std::map<int, cublasLtHandle_t> handles;
    const auto [found, is_new] = handles.try_emplace(device, nullptr);
    if (is_new && cublaslt().create(&found->second) != CUBLAS_STATUS_SUCCESS) {
        found->second = nullptr;
    }
    return found->second;
}

}  // namespace

std::string cublaslt_missing(int device) {
    if (!cublaslt().missing.empty()) return cublaslt().missing;
    const std::lock_guard lock(mutex);
    return handle_of(device) != nullptr ? "" : "cublasLtCreate failed";
}

bool plan_matmul(const Matmul& matmul, MatmulPlan& plan) {
    Layout a, b;
    if (!is_suitable(matmul, a, b) || !cublaslt().missing.empty()) return false;
    const std::array<int64_t, 15> key = {matmul.device,
                                         int64_t(matmul.dtype),
                                         epilogue_of(matmul),
                                         matmul.a.rows,
                                         matmul.a.columns,
                                         matmul.b.columns,
                                         a.transposed,
                                         a.leading,
                                         b.transposed,
                                         b.leading,
                                         alignment_of(matmul.a.data),
                                         alignment_of(matmul.b.data),
                                         alignment_of(matmul.out),
                                         alignment_of(matmul.bias),
                                         alignment_of(matmul.inner)};
    static std::map<std::array<int64_t, 15>, std::pair<bool, MatmulPlan>> plans;
    const std::lock_guard lock(mutex);
    const auto known = plans.find(key);
    if (known != plans.end()) {
        plan = known->second.second;
        return known->second.first;
    }
    const cublasLtHandle_t handle = handle_of(matmul.device);
    const bool found = handle != nullptr && ask_for_plan(handle, matmul, a, b, plan);
    plans.emplace(key, std::make_pair(found, plan));
    return found;
}

void run_matmul(const Matmul& matmul, const MatmulPlan& plan, void* workspace, void* stream) {
    Layout a, b;
    if (!is_suitable(matmul, a, b)) throw std::invalid_argument("a product that was not planned");
    const Descriptors described(matmul, a, b);
    cublasLtHandle_t handle;
    {
        const std::lock_guard lock(mutex);
        handle = handle_of(matmul.device);
    }
    cublasLtMatmulAlgo_t algorithm;
    std::copy(std::begin(plan.algorithm), std::end(plan.algorithm), algorithm.data);
    const float one = 1.0f, zero = 0.0f;
    check(cublaslt().multiply(handle, described.operation, &one, matmul.b.data, described.a,
                              matmul.a.data, described.b, &zero, matmul.out, described.out,
                              matmul.out, described.out, &algorithm, workspace,
                              plan.workspace_bytes, static_cast<cudaStream_t>(stream)),
          "cublasLtMatmul");
}

}  // namespace gpt2fast::launch
