// Runs the tests of one instruction set, if this processor has it. Compiled for any processor.
#include "testing.h"

bool test_kernels();

int main() {
    testing::need_kernels();
    return test_kernels() ? 0 : 1;
}
