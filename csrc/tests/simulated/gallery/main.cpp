// gallery --list: names of the planted bugs. gallery N: runs number N of them with its bug.
// gallery clean: runs all without. The environment chooses the schedule.
#include "gallery.h"

#include <cstdio>
#include <cstdlib>

using namespace gpt2fast;

namespace {

bool passes(const simulated::Bug& bug, bool planted) {
    try {
        bug.run(planted);
        return true;
    } catch (const simulator::Error& error) {
        std::printf("simulator error: %s (%s)\n", error.what(), bug.name);
    } catch (const std::exception& error) {
        std::printf("wrong result: %s (%s)\n", error.what(), bug.name);
    }
    return false;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string what = count == 2 ? arguments[1] : "";
    if (what == "--list") {
        for (const simulated::Bug& bug : simulated::bugs()) std::printf("%s\n", bug.name);
        return 0;
    }
    if (what == "clean") {
        bool passed = true;
        for (const simulated::Bug& bug : simulated::bugs()) passed = passes(bug, false) && passed;
        return passed ? 0 : 1;
    }
    const size_t number = std::strtoul(what.c_str(), nullptr, 10);
    if (what.empty() || number >= simulated::bugs().size()) {
        std::fprintf(stderr, "usage: gallery --list | clean | N\n");
        return 2;
    }
    return passes(simulated::bugs()[number], true) ? 0 : 1;
}
