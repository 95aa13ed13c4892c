// Sizes of the structures that Python fills in: abi.py compares them when the library is loaded.
#pragma once

#include "grid.h"
#include "hessian.h"
#include "min_max.h"
#include "optimal.h"
#include "sweeps.h"

#define SIZE_OF(name) \
  extern "C" int64_t size_of_##name() { return sizeof(name); }

SIZE_OF(Box)
SIZE_OF(Format)
SIZE_OF(MinMax)
SIZE_OF(GridSearch)
SIZE_OF(GridReport)
SIZE_OF(SumTask)
SIZE_OF(ProjectionTask)
SIZE_OF(CodeTask)
SIZE_OF(CoupledTask)
SIZE_OF(SweepTask)
