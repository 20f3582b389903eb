// Run-time choice of the instruction set.
#pragma once
#include <vector>

#include "conv.h"
#include "job.h"

namespace fractal::cpu {

struct Isa {
  const char* name;
  RunFn run;
  const ConvKernels* conv;  // null: none for this set
};

std::vector<Isa> supported_isas();  // of this machine, widest first
const Isa& selected_isa();
RunFn select_run();

}  // namespace fractal::cpu
