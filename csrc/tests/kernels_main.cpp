// Runs the tests of one instruction set, if this processor has it. Compiled for any processor.
#include "testing.h"

bool test_attention();
bool test_kernels();
bool test_tiles();

int main() {
    testing::need_kernels();
    bool fine = test_kernels();
    fine &= test_attention();
    fine &= test_tiles();
    return fine ? 0 : 1;
}
