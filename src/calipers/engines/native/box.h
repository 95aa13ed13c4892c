// Where the values of groups lie in memory, and how a block of groups comes out of it, one in each lane.
#pragma once

#include <algorithm>
#include <utility>

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

template <Type type>
static inline float load_one(const void* source, int64_t at) {
  if (type == FLOAT32) return static_cast<const float*>(source)[at];
  uint32_t half = static_cast<const uint16_t*>(source)[at];
  if (type == BFLOAT16) return float_of_bits(half << 16);
  uint32_t wide = bits_of_one(float_of_bits((half & 0x7fff) << 13) * 0x1p112f);
  wide |= (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return float_of_bits(wide | (half & 0x8000) << 16);
}

// Number of values of a unit.
static inline int64_t count_of(const Box& box, int64_t unit) {
  if (box.runs == 1) return box.size;
  return std::clamp<int64_t>(box.size - unit % box.runs * box.run_length, 0, box.run_length);
}

// Call visit(first element, count, stride) for the straight parts of a unit, in order.
template <bool weight = false, typename Visit>
static inline void walk_run(const Box& box, int64_t unit, Visit visit) {
  auto stride = [&](const Dims& dims, int d) { return weight ? dims.weight[d] : dims.value[d]; };
  // Divisions would be most of the work on a short group: they are left out where they can be.
  int64_t group = unit, first = 0, count = box.size, offset = 0;
  if (box.runs > 1) {
    group = unit / box.runs;
    first = unit % box.runs * box.run_length;
    count = count_of(box, unit);
  }
  int64_t outer = group;
  for (int d = int(box.kept.count) - 1; d > 0; d--) {
    offset += outer % box.kept.size[d] * stride(box.kept, d);
    outer /= box.kept.size[d];
  }
  offset += outer * stride(box.kept, 0);
  const Dims& reduced = box.reduced;
  int last = int(reduced.count) - 1;
  int64_t step = stride(reduced, last), length = reduced.size[last];
  if (box.columns) {
    const int64_t* column = box.columns + group % box.lists * box.size + first;
    for (int64_t i = 0; i < count; i++) visit(offset + column[i] * step, 1, 1);
    return;
  }
  if (last == 0) {
    visit(offset + first * step, count, step);
    return;
  }
  for (int64_t i = 0; i < count;) {
    int64_t row = (first + i) / length, begin = (first + i) % length, at = offset;
    for (int d = last - 1; d >= 0; d--) {
      at += row % reduced.size[d] * stride(reduced, d);
      row /= reduced.size[d];
    }
    int64_t many = std::min(length - begin, count - i);
    visit(at + begin * step, many, step);
    i += many;
  }
}

// The same, as searches take it in.
template <Type type, bool finite_only>
static inline float take_one(const void* source, int64_t at) {
  float x = load_one<type>(source, at);
  return finite_only && (bits_of_one(x) & 0x7f800000) == 0x7f800000 ? 0 : x;
}

// Where the values of a block's units lie when each is one straight part of one dimension.
struct Straight {
  int64_t at[LANES];
  int64_t stride;
};

template <bool weight>
static bool is_straight(const Box& box, int64_t block, Straight& found) {
  if (box.columns || box.reduced.count > 1 || (block + 1) * LANES > box.units()) return false;
  bool straight = true;
  for (int lane = 0; lane < LANES; lane++)
    walk_run<weight>(box, block * LANES + lane, [&](int64_t at, int64_t count, int64_t stride) {
      found.at[lane] = at;
      found.stride = stride;
      straight &= count == box.run_length;
    });
  return straight;
}

template <Type type, bool finite_only, size_t... lane>
static void load_straight(const void* source, const Straight& from, int64_t length, float* target,
                          std::index_sequence<lane...>) {
  for (int64_t i = 0; i < length; i++)
    store(target + i * LANES,
          Vec{take_one<type, finite_only>(source, from.at[lane] + i * from.stride)...});
}

// One lane for each unit of the block; zeros where a run or the block is short, which cost nothing:
// every format has a code for zero.
template <Type type, bool finite_only, bool weight>
static void load_block(const Box& box, int64_t block, float* target) {
  const void* source = weight ? box.weights : box.values;
  Straight straight;
  if (is_straight<weight>(box, block, straight)) {
    load_straight<type, finite_only>(source, straight, box.run_length, target,
                                     std::make_index_sequence<LANES>());
    return;
  }
  for (int lane = 0; lane < LANES; lane++) {
    int64_t unit = block * LANES + lane, done = 0;
    if (unit < box.units())
      walk_run<weight>(box, unit, [&](int64_t at, int64_t count, int64_t stride) {
        for (int64_t i = 0; i < count; i++, done++)
          target[done * LANES + lane] = take_one<type, finite_only>(source, at + i * stride);
      });
    for (; done < box.run_length; done++) target[done * LANES + lane] = 0;
  }
}

template <bool finite_only, bool weight>
static void load_block(const Box& box, int64_t block, float* target) {
  switch (weight ? box.weight_type : box.value_type) {
    case FLOAT32:
      return load_block<FLOAT32, finite_only, weight>(box, block, target);
    case BFLOAT16:
      return load_block<BFLOAT16, finite_only, weight>(box, block, target);
    default:
      return load_block<FLOAT16, finite_only, weight>(box, block, target);
  }
}

template <bool weight>
static void load_block(const Box& box, int64_t block, float* target) {
  if (box.finite_only && !weight)
    load_block<true, weight>(box, block, target);
  else
    load_block<false, weight>(box, block, target);
}

// A number of the group of each lane.
static inline Vec by_group(const Box& box, const float* numbers, int64_t block) {
  float lanes[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    int64_t unit = std::min(block * LANES + lane, box.units() - 1);
    lanes[lane] = numbers[box.runs > 1 ? unit / box.runs : unit];
  }
  return load(lanes);
}
