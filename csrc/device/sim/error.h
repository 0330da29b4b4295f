// How the simulator reports what a GPU would answer with a hang, a fault or a wrong result.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

namespace gpt2fast::simulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A place in a kernel's source.
struct Site {
    const char* file;
    int line;

    // As the default of a parameter: where the function that has the parameter is called.
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

inline bool operator==(const Site& a, const Site& b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string to_string(const Site& site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
}

}  // namespace gpt2fast::simulator

// The last parameter of what kernels call.
#define GPT2FAST_SITE ::gpt2fast::simulator::Site site = ::gpt2fast::simulator::Site::here()
