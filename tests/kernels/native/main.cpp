// Runs the kernels of the instruction set that PYCSE_CPU_ISA names (the best one where it is not set) on odd shapes,
// each buffer as long as it has to be and no longer. `--list` prints the sets of this processor. A sanitizer sees what
// reads too far or races; the checks see what is wrong.
#include "../../../kernels/cpu/dispatch.h"
#include "check.h"

int main(int arguments, char** argument) {
  if (arguments > 1 && std::string(argument[1]) == "--list") {
    for (const std::string& name : pycse::cpu_instruction_sets()) std::puts(name.c_str());
    return 0;
  }
  const pycse::Kernels& kernels = pycse::cpu_kernels();
  checks::contrastive(kernels);
  checks::small(kernels);
  checks::distill(kernels);
  checks::sparse(kernels);
  checks::sigmoid(kernels);
  checks::supervised(kernels);
  checks::guide(kernels);
  checks::adapacse(kernels);
  checks::prefixes(kernels);
  std::printf("%s: %d comparisons, %d failed\n", kernels.isa, checks::comparisons, checks::failures);
  return checks::failures > 0 || checks::comparisons == 0;
}
