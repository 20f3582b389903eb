// Run-time choice of the instruction set.
#pragma once
#include "conv.h"
#include "job.h"

namespace fractal::cpu {

struct Isa {
  const char* name;
  RunFn run;
  const ConvKernels* conv;  // [kConvDtypes], or null: none for this set
};

const Isa& selected_isa();

}  // namespace fractal::cpu
