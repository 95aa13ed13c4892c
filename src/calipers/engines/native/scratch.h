// Memory for one block of values, on the boundary of a vector.
#pragma once

#include <cstdlib>

#include "simd.h"

struct Scratch {
  float* data;
  explicit Scratch(int64_t rows)
      : data(static_cast<float*>(std::aligned_alloc(64, (rows * LANES * 4 / 64 + 1) * 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};
