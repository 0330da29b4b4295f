// Addresses of shared memory: 32-bit numbers, as ldmatrix, cp.async and mbarriers take them.
#pragma once

#include <cstdint>
#include <string>

#include "block.h"

namespace gpt2fast::simulator {

// Where the window begins: 0 is no address of shared memory.
constexpr uint32_t shared_window = 1024;

inline uint32_t shared_address(const void* pointer, const Site& site) {
    const auto offset = static_cast<const unsigned char*>(pointer) - block().shared;
    if (offset < 0 || size_t(offset) > block().shared_bytes) {
        fail("shared_address of what is not in shared memory", site);
    }
    return shared_window + uint32_t(offset);
}

// The memory behind an address, if all of it belongs to the block.
inline unsigned char* resolve(uint32_t address, size_t bytes, size_t alignment, const char* what,
                              const Site& site) {
    if (address % alignment != 0) {
        fail(std::string(what) + ": shared address " + std::to_string(address) +
                 " is not aligned to " + std::to_string(alignment) + " bytes",
             site);
    }
    if (address < shared_window || address - shared_window + bytes > block().shared_bytes) {
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at offset " +
                 std::to_string(int64_t(address) - shared_window) + " of " +
                 std::to_string(block().shared_bytes) + " bytes of shared memory",
             site);
    }
    return block().shared + (address - shared_window);
}

}  // namespace gpt2fast::simulator
