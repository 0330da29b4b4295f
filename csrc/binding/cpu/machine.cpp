// The instruction set in use, the speed of memory, and fingerprints of tensors.
#include "tensors.h"

#include <string>

#include "../../cpu/bandwidth.h"
#include "../../cpu/fingerprint.h"

namespace gpt2fast::binding {
namespace {

// Almost surely changes when any byte of the contiguous tensors does.
int64_t fingerprint(std::vector<Tensor> tensors) {
    constexpr int64_t chunk = 1 << 20;
    std::vector<std::pair<const uint8_t*, int64_t>> chunks;
    for (const Tensor& x : tensors) {
        check_stored(x, "a tensor");
        GPT2FAST_CHECK(x.is_contiguous(), "fingerprint needs contiguous tensors");
        const auto* data = static_cast<const uint8_t*>(x.const_data_ptr());
        const int64_t bytes = x.numel() * int64_t(x.element_size());
        for (int64_t i = 0; i < bytes; i += chunk) {
            chunks.emplace_back(data + i, std::min(chunk, bytes - i));
        }
    }
    std::vector<uint64_t> parts(chunks.size());
    run_team(threads(), [&](Worker& worker) {
        worker.for_each(int64_t(chunks.size()), [&](int64_t i) {
            parts[size_t(i)] =
                gpt2fast::fingerprint(chunks[size_t(i)].first, chunks[size_t(i)].second);
        });
    });
    return int64_t(gpt2fast::fingerprint(reinterpret_cast<const uint8_t*>(parts.data()),
                                         int64_t(parts.size() * sizeof(uint64_t))));
}

// The instruction set whose kernels run.
std::string isa() { return kernels().name; }

// Bytes per second, the median of `repeats` passes.
double read_bandwidth(int64_t threads, int64_t bytes, int64_t repeats) {
    GPT2FAST_CHECK(threads > 0 && bytes > 0 && repeats > 0, "nothing to read");
    return gpt2fast::read_bandwidth(int(threads), size_t(bytes), int(repeats))[repeats / 2];
}

}  // namespace

GPT2FAST_OP_EVERYWHERE(isa, "");
GPT2FAST_OP_EVERYWHERE(read_bandwidth, "threads, bytes, repeats");
GPT2FAST_OP(fingerprint, "tensors");

}  // namespace gpt2fast::binding
