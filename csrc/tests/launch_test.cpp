// The host's half of device_api.h as nvcc compiles it, on a stand-in for CUDA: launches from many
// threads find their shared memory allowed, and nothing is asked of a device twice.
#define __CUDACC__ 1
#include "../device/device_api.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using namespace gpt2fast::device;

namespace {

void kernel(int) {}

std::atomic<int> failures{0};

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("not so: %s\n", what);
    ++failures;
}

}  // namespace

int main() {
    constexpr int rounds = 2000, threads = 4;
    const auto launch_all = [](int thread) {
        const int device = thread % 2;
        use_device(device);
        // Sizes that differ, from small ones to all there is.
        const size_t sizes[] = {1 << 10, 50 << 10, size_t(fake_cuda::most_shared[device])};
        for (int i = 0; i < rounds; ++i) {
            expect(multiprocessors() == fake_cuda::multiprocessors[device], "the device's own");
            try {
                launch(&kernel, dim3{}, dim3{}, sizes[(i + thread) % 3], nullptr, 1);
            } catch (const std::runtime_error&) {
            }
        }
    };
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) running.emplace_back(launch_all, i);
    for (std::thread& each : running) each.join();
    expect(fake_cuda::launches == rounds * threads, "every launch reaches CUDA");
    expect(fake_cuda::refused == 0, "no launch lacks shared memory");
    expect(fake_cuda::settings == 2, "the limit is set once on each device");
    expect(fake_cuda::questions == 4, "two attributes are asked for, once on each device");
    std::printf("%d launches, %d failures\n", int(fake_cuda::launches), int(failures));
    return failures == 0 ? 0 : 1;
}
