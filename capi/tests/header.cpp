// The header in a C++ program that is linked statically.
#include "pat.h"

int main() {
    PatProblem problem = {};
    return pat_abi_version() == PAT_ABI_VERSION && pat_version()[0] != '\0'
                   && pat_supports(&problem, 0, nullptr, nullptr) == PAT_STATUS_INVALID_ARGUMENT
               ? 0
               : 1;
}
