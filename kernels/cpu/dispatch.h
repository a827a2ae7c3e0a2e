// The best instruction set that this processor runs; PYCSE_CPU_ISA names another one (the tests run them all).
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace pycse {
std::vector<std::string> cpu_instruction_sets();  // usable here, best first
const Kernels& cpu_kernels();                      // the one in use
}  // namespace pycse
