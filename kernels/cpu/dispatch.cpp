#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace pycse {

namespace portable {
Kernels kernels();
}
#ifdef PYCSE_X86
namespace v3 {
Kernels kernels();
}
namespace v4 {
Kernels kernels();
}
#endif
#ifdef PYCSE_AMX
namespace amx {
bool available();
Kernels kernels();
}  // namespace amx
#endif

static std::vector<Kernels> usable() {
  std::vector<Kernels> found;
#ifdef PYCSE_X86
  __builtin_cpu_init();
  const bool v3_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (v3_ok && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(v4::kernels());
#ifdef PYCSE_AMX
    if (amx::available()) found.insert(found.begin(), amx::kernels());
#endif
  }
  if (v3_ok) found.push_back(v3::kernels());
#endif
  found.push_back(portable::kernels());
  return found;
}

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& k : usable()) names.push_back(k.isa);
  return names;
}

const Kernels& cpu_kernels() {
  static const Kernels chosen = [] {
    const char* wanted = std::getenv("PYCSE_CPU_ISA");
    auto all = usable();
    if (wanted == nullptr || *wanted == 0) return all.front();
    std::string names;
    for (const Kernels& k : all) {
      if (std::string(wanted) == k.isa) return k;
      names += std::string(names.empty() ? "" : ", ") + k.isa;
    }
    throw std::runtime_error("PYCSE_CPU_ISA is '" + std::string(wanted) + "'; this processor runs: " + names);
  }();
  return chosen;
}

}  // namespace pycse
