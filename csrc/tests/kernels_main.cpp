// Runs the tests of one instruction set, if this processor has it. Compiled for any processor.
#include "testing.h"

bool test_kernels();
bool test_tiles();

int main() {
    testing::need_kernels();
    const bool kernels = test_kernels();
    return test_tiles() && kernels ? 0 : 1;
}
