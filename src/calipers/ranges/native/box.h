// Where the values of groups lie in memory, and how sixteen groups at a time come out of it.
#pragma once

#include <algorithm>

#include "simd.h"

constexpr int MOST_DIMS = 3;

// Dimensions, outermost first, with the strides of values and weights in elements.
struct Dims {
  int64_t count;
  int64_t size[MOST_DIMS];
  int64_t value[MOST_DIMS];
  int64_t weight[MOST_DIMS];
};

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// A unit is a group, or one run of the values of a long group.
struct Box {
  const void* values;
  const void* weights;     // null: all alike
  const int64_t* columns;  // null: no gathering; else (lists, size), the innermost kept dimension
  int64_t lists;
  int64_t value_type;
  int64_t weight_type;
  int64_t finite_only;  // whether NaN and Inf become zeros
  Dims kept;
  Dims reduced;
  int64_t groups;
  int64_t size;        // values of a group
  int64_t runs;        // of each group
  int64_t run_length;  // of all runs but the last

  int64_t units() const { return groups * runs; }
  int64_t blocks() const { return (units() + LANES - 1) / LANES; }
};

static inline float from_float32(const void* source, int64_t at) {
  return static_cast<const float*>(source)[at];
}
static inline float from_bfloat16(const void* source, int64_t at) {
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(source)[at]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline float from_float16(const void* source, int64_t at) {
  uint32_t half = static_cast<const uint16_t*>(source)[at];
  uint32_t bits = (half & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;  // the exponents of float32 begin 112 lower; right for subnormal numbers too
  std::memcpy(&bits, &x, 4);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= (half & 0x8000) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <float (*get)(const void*, int64_t), bool finite_only>
static void load_run(const Box& box, const void* source, int64_t group, int64_t first,
                     int64_t count, bool weight, float* target) {
  auto stride = [&](const Dims& dims, int d) { return weight ? dims.weight[d] : dims.value[d]; };
  auto put = [&](int64_t i, int64_t at) {
    float x = get(source, at);
    if (finite_only && (bits_of_one(x) & 0x7f800000) == 0x7f800000) x = 0;
    target[i * LANES] = x;
  };
  int64_t offset = 0, rest = group;
  for (int d = int(box.kept.count) - 1; d >= 0; d--) {
    offset += rest % box.kept.size[d] * stride(box.kept, d);
    rest /= box.kept.size[d];
  }
  const Dims& reduced = box.reduced;
  int last = int(reduced.count) - 1;
  int64_t step = stride(reduced, last), length = reduced.size[last];
  if (box.columns) {
    const int64_t* column = box.columns + group % box.lists * box.size + first;
    for (int64_t i = 0; i < count; i++) put(i, offset + column[i] * step);
    return;
  }
  for (int64_t i = 0; i < count;) {
    int64_t row = (first + i) / length, begin = (first + i) % length, at = offset;
    for (int d = last - 1; d >= 0; d--) {
      at += row % reduced.size[d] * stride(reduced, d);
      row /= reduced.size[d];
    }
    int64_t many = std::min(length - begin, count - i);
    at += begin * step;
    if (step == 1)
      for (int64_t k = 0; k < many; k++) put(i + k, at + k);
    else
      for (int64_t k = 0; k < many; k++) put(i + k, at + k * step);
    i += many;
  }
}

// One lane for each unit of the block; zeros where a run or the block is short, which cost nothing:
// every format has a code for zero.
static void load_block(const Box& box, int64_t block, bool weight, float* target) {
  const void* source = weight ? box.weights : box.values;
  int64_t type = weight ? box.weight_type : box.value_type;
  bool finite = box.finite_only && !weight;
  for (int lane = 0; lane < LANES; lane++) {
    int64_t unit = block * LANES + lane, first = 0, count = 0;
    if (unit < box.units()) {
      first = unit % box.runs * box.run_length;
      count = std::clamp<int64_t>(box.size - first, 0, box.run_length);
      auto load = type == FLOAT32    ? (finite ? load_run<from_float32, true>
                                               : load_run<from_float32, false>)
                  : type == BFLOAT16 ? (finite ? load_run<from_bfloat16, true>
                                               : load_run<from_bfloat16, false>)
                                     : (finite ? load_run<from_float16, true>
                                               : load_run<from_float16, false>);
      load(box, source, unit / box.runs, first, count, weight, target + lane);
    }
    for (int64_t i = count; i < box.run_length; i++) target[i * LANES + lane] = 0;
  }
}
