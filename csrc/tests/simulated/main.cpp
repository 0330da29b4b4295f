// simulated_test [--list | --once] [part of a name...]: the cases that were linked in, each under
// several schedules, with --once under the first one only.
#include "testing.h"

#include <chrono>
#include <cstdio>
#include <exception>

using namespace gpt2fast;

namespace {

struct Schedule {
    const char* name;
    simulator::Settings settings;
};

const Schedule schedules[] = {
    {"fifo", {simulator::Order::fifo, 0, simulator::Arrival::deferred}},
    {"lifo", {simulator::Order::lifo, 0, simulator::Arrival::deferred}},
    {"random 1", {simulator::Order::random, 1, simulator::Arrival::deferred}},
    {"random 2, immediate", {simulator::Order::random, 2, simulator::Arrival::immediate}},
};

bool chosen(const std::string& name, int count, char** parts) {
    for (int i = 0; i < count; ++i) {
        if (name.find(parts[i]) != std::string::npos) return true;
    }
    return count == 0;
}

bool passes(const simulated::Case& each, bool once) {
    const auto start = std::chrono::steady_clock::now();
    bool passed = true;
    for (const Schedule& schedule : schedules) {
        simulator::use_settings(schedule.settings);
        try {
            each.run();
        } catch (const std::exception& error) {
            std::fprintf(stderr, "FAILED %s (%s): %s\n", each.name, schedule.name, error.what());
            passed = false;
        }
        if (once) break;
    }
    if (passed) {
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("ok     %-60s %6.2f s\n", each.name, seconds.count());
    }
    return passed;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string option = count > 1 ? arguments[1] : "";
    const bool list = option == "--list", once = option == "--once";
    if (list || once) {
        --count;
        ++arguments;
    }
    int ran = 0, failed = 0;
    for (const simulated::Case& each : simulated::cases()) {
        if (!chosen(each.name, count - 1, arguments + 1)) continue;
        if (list) {
            std::printf("%s\n", each.name);
            continue;
        }
        ++ran;
        if (!passes(each, once)) ++failed;
    }
    if (list) return 0;
    std::printf("%d passed, %d failed\n", ran - failed, failed);
    return failed == 0 && ran > 0 ? 0 : 1;
}
