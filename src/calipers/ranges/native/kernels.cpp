#include "grid.h"
#include "min_max.h"
