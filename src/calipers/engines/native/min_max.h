// Smallest and largest value of every unit, in one pass over memory.
#pragma once

#include <limits>
#include <utility>

#include "box.h"
#include "parallel.h"

struct MinMax {
  Box box;
  void* low;  // of each unit, of the type of the values
  void* high;
};

// Bytes of a register: wider vectors would live in memory.
constexpr int WIDTH = sizeof(Vec);

// Floats are compared as integers: with the bits of negative ones turned over they have the same
// order. Codes beyond those of the infinities are NaN, so that the extremes tell whether there was
// one.
template <typename Integer, int BYTES>
struct Extremes {
  typedef Integer Lanes __attribute__((vector_size(BYTES)));
  static constexpr int64_t COUNT = BYTES / sizeof(Integer);

  Lanes low, high;

  static Lanes turn_lanes(Lanes bits) {
    return bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max());
  }

  template <bool finite_only>
  void take(Lanes bits, Integer infinity) {
    Lanes code = turn_lanes(bits), below = code, above = code;
    if (finite_only) {
      Lanes odd = (bits & infinity) == infinity;
      below = odd ? low : code;
      above = odd ? high : code;
    }
    low = below < low ? below : low;
    high = above > high ? above : high;
  }

  // Back to the bits of floats; a NaN at either end becomes both ends.
  void close(Integer infinity) {
    high = low < Integer(~infinity) ? low : high;
    low = high > infinity ? high : low;
    low = turn_lanes(low);
    high = turn_lanes(high);
  }
};

// One of many lanes, by halves.
template <typename Integer, int BYTES, typename Pick>
static inline Integer fold(typename Extremes<Integer, BYTES>::Lanes lanes, Pick pick) {
  if constexpr (BYTES == 2 * sizeof(Integer)) {
    return pick(Integer(lanes[0]), Integer(lanes[1]));
  } else {
    typename Extremes<Integer, BYTES / 2>::Lanes first, second;
    split(lanes, first, second);
    return fold<Integer, BYTES / 2>(pick(first, second), pick);
  }
}

// Values from `i` on that do not fill the lanes, or lie apart; repeated where there are too few.
template <typename Lanes, typename Integer>
static inline Lanes gather(const Integer* source, int64_t i, int64_t count, int64_t stride) {
  constexpr int64_t COUNT = sizeof(Lanes) / sizeof(Integer);
  Integer lanes[COUNT];
  for (int64_t lane = 0; lane < COUNT; lane++)
    lanes[lane] = source[std::min(i + lane, count - 1) * stride];
  Lanes found;
  std::memcpy(&found, lanes, sizeof found);
  return found;
}

template <typename Integer, bool finite_only>
static inline void take_all(Extremes<Integer, WIDTH>& found, const Integer* values, int64_t count,
                            int64_t stride, Integer infinity) {
  using Lanes = typename Extremes<Integer, WIDTH>::Lanes;
  constexpr int64_t COUNT = WIDTH / sizeof(Integer);
  Extremes<Integer, WIDTH> part = found;  // in registers
  int64_t i = 0;
  if (stride == 1)
    for (; i + COUNT <= count; i += COUNT) {
      Lanes bits;
      std::memcpy(&bits, values + i, sizeof bits);
      part.template take<finite_only>(bits, infinity);
    }
  for (; i < count; i += COUNT)
    part.template take<finite_only>(gather<Lanes>(values, i, count, stride), infinity);
  found = part;
}

// Groups beside each other whose rows are read together, in the order of memory.
constexpr int64_t MOST_BESIDE = 64;

template <typename Integer, bool finite_only>
static void find_extremes(const MinMax& task, int64_t first, int64_t last, Integer infinity) {
  using Found = Extremes<Integer, WIDTH>;
  using Lanes = typename Found::Lanes;
  const Box& box = task.box;
  const Integer* values = static_cast<const Integer*>(box.values);
  Integer* lows = static_cast<Integer*>(task.low);
  Integer* highs = static_cast<Integer*>(task.high);
  auto least = [](auto a, auto b) { return a < b ? a : b; };
  auto most = [](auto a, auto b) { return a > b ? a : b; };
  const bool have_rows = box.reduced.count == 2 && box.runs == 1;
  const int64_t in_line = box.kept.size[box.kept.count - 1];
  const int64_t aside = box.kept.value[box.kept.count - 1];
  Found found[MOST_BESIDE];
  for (int64_t unit = first, beside = 1; unit < last; unit += beside) {
    if (have_rows) beside = std::min({MOST_BESIDE, last - unit, in_line - unit % in_line});
    for (int64_t k = 0; k < beside; k++)
      found[k] = {Lanes{} + infinity, Lanes{} + Integer(~infinity)};  // the infinities
    walk_run(box, unit, [&](int64_t at, int64_t count, int64_t stride) {
      for (int64_t k = 0; k < beside; k++)
        take_all<Integer, finite_only>(found[k], values + at + k * aside, count, stride,
                                              infinity);
    });
    for (int64_t k = 0; k < beside; k++) {
      Found all{Lanes{} + fold<Integer, WIDTH>(found[k].low, least),
                Lanes{} + fold<Integer, WIDTH>(found[k].high, most)};
      all.close(infinity);
      lows[unit + k] = all.low[0];
      highs[unit + k] = all.high[0];
    }
  }
}

// Groups of sixteen one after the other, as NVFP4 has them: vectors of one group are compared, then
// neighbours with each other until there is one for each group.
constexpr int64_t SHORT_GROUP = 16;

// How often neighbours are compared: one lane for each group is left of as many lanes.
constexpr int levels_for(int64_t lanes) {
  return lanes == 1 ? 0 : 1 + levels_for(lanes / 2);
}

template <typename Lanes, typename Pick, size_t... I>
static inline Lanes join(Lanes a, Lanes b, Pick pick, std::index_sequence<I...>) {
#ifdef __clang__
  Lanes even = __builtin_shufflevector(a, b, int(2 * I)...);
  Lanes odd = __builtin_shufflevector(a, b, int(2 * I + 1)...);
#else
  Lanes even = __builtin_shuffle(a, b, Lanes{(2 * I)...});
  Lanes odd = __builtin_shuffle(a, b, Lanes{(2 * I + 1)...});
#endif
  return pick(even, odd);
}

template <typename Integer, bool finite_only, int level>
static inline Extremes<Integer, WIDTH> join_neighbours(const Integer* values, Integer infinity) {
  using Found = Extremes<Integer, WIDTH>;
  using Lanes = typename Found::Lanes;
  constexpr int64_t LEAF = std::max(SHORT_GROUP, Found::COUNT);
  if constexpr (level == 0) {
    Found found{Lanes{} + infinity, Lanes{} + Integer(~infinity)};
#pragma GCC unroll 8
    for (int64_t i = 0; i < LEAF; i += Found::COUNT) {
      Lanes bits;
      std::memcpy(&bits, values + i, sizeof bits);
      found.template take<finite_only>(bits, infinity);
    }
    return found;
  } else {
    auto least = [](Lanes a, Lanes b) { return a < b ? a : b; };
    auto most = [](Lanes a, Lanes b) { return a > b ? a : b; };
    auto lanes = std::make_index_sequence<Found::COUNT>();
    auto a = join_neighbours<Integer, finite_only, level - 1>(values, infinity);
    auto b = join_neighbours<Integer, finite_only, level - 1>(
        values + (LEAF << (level - 1)), infinity);
    return {join(a.low, b.low, least, lanes), join(a.high, b.high, most, lanes)};
  }
}

// How many units from `first` on were done so; the rest is for others.
template <typename Integer, bool finite_only>
static int64_t find_short_extremes(const MinMax& task, int64_t first, int64_t last,
                                   Integer infinity) {
  using Found = Extremes<Integer, WIDTH>;
  const Box& box = task.box;
  bool straight = !box.columns && box.runs == 1 && box.kept.count == 1 && box.reduced.count == 1;
  if (!straight || box.size != SHORT_GROUP || box.kept.value[0] != box.size ||
      box.reduced.value[0] != 1)
    return 0;
  constexpr int LEVELS = levels_for(std::min(SHORT_GROUP, Found::COUNT));
  int64_t unit = first;
  for (; unit + Found::COUNT <= last; unit += Found::COUNT) {
    const Integer* values = static_cast<const Integer*>(box.values) + unit * box.size;
    Found found = join_neighbours<Integer, finite_only, LEVELS>(values, infinity);
    found.close(infinity);
    std::memcpy(static_cast<Integer*>(task.low) + unit, &found.low, sizeof found.low);
    std::memcpy(static_cast<Integer*>(task.high) + unit, &found.high, sizeof found.high);
  }
  return unit - first;
}

template <typename Integer, bool finite_only>
static void choose_extremes(const MinMax& task, int64_t first, int64_t last, Integer infinity) {
  first += find_short_extremes<Integer, finite_only>(task, first, last, infinity);
  find_extremes<Integer, finite_only>(task, first, last, infinity);
}

template <typename Integer>
static void find_all_extremes(const MinMax& task, int64_t parts, Integer infinity) {
  in_parallel(task.box.units(), parts, [&](int64_t, int64_t first, int64_t last) {
    if (task.box.finite_only)
      choose_extremes<Integer, true>(task, first, last, infinity);
    else
      choose_extremes<Integer, false>(task, first, last, infinity);
  });
}

extern "C" void min_max(const MinMax* task, int64_t parts) {
  switch (task->box.value_type) {
    case FLOAT32:
      return find_all_extremes<int32_t>(*task, parts, 0x7f800000);
    case BFLOAT16:
      return find_all_extremes<int16_t>(*task, parts, 0x7f80);
    default:
      return find_all_extremes<int16_t>(*task, parts, 0x7c00);
  }
}
