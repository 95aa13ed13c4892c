// All of the library: one translation unit, compiled by build.py.
#include "grid.h"
#include "hessian.h"
#include "min_max.h"
#include "optimal.h"
#include "sizes.h"
#include "sweeps.h"
