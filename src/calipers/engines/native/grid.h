// The shrink grid: a block of units is brought into the cache once for all candidates.
#pragma once

#include <limits>
#include <vector>

#include "power.h"
#include "sums.h"

// Candidates of one loop over the values, whose sums stay in registers.
constexpr int TILE = 4;

struct GridSearch {
  Box box;
  Format format;
  const float* low;  // expanded range of each group
  const float* high;
  const float* units;  // of each group: what its values and scales are multiplied by
  const float* factors;  // of each step
  int64_t steps;
  float norm;
  float expand;
  float clip_steps;  // scales that the whole range spans; 0: clipping bounds nothing
  int64_t squares_first;  // whether candidates are dismissed by their squared errors, norm > 2
  float doubt;       // part of the smallest error that leaves no doubt about the best step
  float noise;       // error of a value by rounding, as a part of the largest value
  const double* known_errors;  // (groups, steps) where they are summed already, else null
  double* errors;              // (units, steps) to be filled where groups have several runs
  float* best_low;
  float* best_high;
  uint8_t* doubtful;  // whether another scale of a group is as good but for rounding
};

// What a thread tells of its share.
struct GridReport {
  uint8_t* gains;     // for each step, whether it made any group better
  int64_t evaluated;  // candidates, summed over groups
};

template <bool INTEGER, Power POWER, bool WEIGHTED>
static void sum_errors(const GridSearch& search, const float* values, const float* weights,
                       const Candidate* candidates, Vec* errors) {
  // One by one: as a whole arrays are copied and cleared by instructions that take long to start.
  Candidate c[TILE];
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) {
    c[t].scale = candidates[t].scale;
    c[t].inverse = candidates[t].inverse;
    c[t].far = candidates[t].far;
    errors[t] = Vec{};
  }
  for (int64_t begin = 0; begin < search.box.run_length; begin += CHUNK) {
    int64_t end = std::min(begin + CHUNK, search.box.run_length);
    Vec sums[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) sums[t] = Vec{};
    for (int64_t i = begin; i < end; i++) {
      Vec value = load(values + i * LANES);
      Vec weight = WEIGHTED ? load(weights + i * LANES) : Vec{};
      Vec losses[TILE];
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) losses[t] = error_of<INTEGER>(search.format, value, c[t]);
      raise_to_power<POWER, TILE>(losses, search.norm);
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) sums[t] += WEIGHTED ? losses[t] * weight : losses[t];
    }
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) errors[t] += sums[t];
  }
}

using SumErrors = void (*)(const GridSearch&, const float*, const float*, const Candidate*, Vec*);

template <bool INTEGER, Power POWER>
static SumErrors choose_sum(bool weighted) {
  return weighted ? sum_errors<INTEGER, POWER, true> : sum_errors<INTEGER, POWER, false>;
}

template <bool INTEGER>
static SumErrors choose_sum(float norm, bool weighted) {
  if (norm == 2) return choose_sum<INTEGER, SQUARE>(weighted);
  if (norm == 3) return choose_sum<INTEGER, CUBE>(weighted);
  if (norm < 2) return choose_sum<INTEGER, BELOW_TWO>(weighted);
  if (norm > 4) return choose_sum<INTEGER, STEEP>(weighted);
  return choose_sum<INTEGER, ABOVE_TWO>(weighted);
}

struct Best {
  Vec error, next, scale, factor;
};

// 2**exponent or less, where the exponent adds up logarithms `norm` times at most: each time it may
// be too large by what log2_of is off.
static inline Vec power_bound(Vec exponent, float norm) {
  Vec power = exp2_of(smaller(larger(exponent, splat(-126)), splat(126)));
  return power * (1 - 1e-4f - 1e-5f * norm);
}

// Errors up to which another candidate may be the best one, were they summed without rounding. The
// norm of a group's errors is off by no more than that of what rounding adds to each of them.
static inline Vec doubt_limit(const GridSearch& search, Vec error, Vec total_weight, Vec noise) {
  const float norm = search.norm;
  const Vec weight = larger(total_weight, splat(std::numeric_limits<float>::min()));
  Vec mean = exp2_of(larger(log2_of(error / weight) / norm, splat(-126)));
  mean = select(error > Vec{}, mean, Vec{});
  const Vec little = error * (1 + search.doubt + 1.2f * norm * noise / mean);
  Vec exponent = log2_of(mean + noise) * norm;
  exponent = smaller(larger(exponent, splat(-126)), splat(126));
  const Vec much = weight * exp2_of(exponent) * 1.02f + error * (1 + search.doubt);
  return select(norm * noise < 0.1f * mean, little, select(noise > Vec{}, much, error));
}

// By the inequality of power means sum w |d|^p >= (sum w)^(1 - p/2) (sum w d^2)^(p/2), p > 2: whether
// some of a tile's squared errors leave room for a smaller error than the best.
static bool may_be_better(const Vec* squares, Vec total_weight, float norm, Vec best, IVec is_unit) {
  IVec possible{};
  for (int t = 0; t < TILE; t++) {
    Vec exponent = log2_of(squares[t]) * (norm / 2) + log2_of(total_weight) * (1 - norm / 2);
    // Near the smallest numbers the bound says nothing.
    possible |= (power_bound(exponent, norm) <= best) | (exponent < splat(-100)) |
                (squares[t] != squares[t]);
  }
  return any(possible & is_unit);
}

// The candidates of a block: those of every step, or, where scales are rounded so that many steps
// have the same, for each lane those that differ from the one before.
struct Steps {
  const GridSearch& search;
  Vec range[2], unit;
  bool distinct;
  float* scales;  // distinct: as stored, a vector for each candidate
  float* numbers;  // distinct: of the first step of each
  int64_t count;

  Vec stored(int64_t step, Vec& zero) const {
    Vec shrunk[2];
    shrink_range(range, search.factors[step], shrunk);
    return stored_scale(search.format, shrunk[0], shrunk[1], zero);
  }

  void find_distinct() {
    int64_t held[LANES] = {};
    Vec last{};
    count = 0;
    for (int64_t step = 0; step < search.steps; step++) {
      Vec zero, scale = stored(step, zero);
      uint32_t others = step ? bits_of_lanes(scale != last) : (1u << LANES) - 1;
      for (; others; others &= others - 1) {
        const int lane = __builtin_ctz(others);
        const int64_t at = held[lane]++ * LANES + lane;
        scales[at] = scale[lane];
        numbers[at] = float(step);
        count = std::max(count, held[lane]);
      }
      last = scale;
    }
    // A candidate that comes again does not win.
    for (int lane = 0; lane < LANES; lane++)
      for (int64_t i = held[lane]; i < count; i++) {
        scales[i * LANES + lane] = scales[(i - 1) * LANES + lane];
        numbers[i * LANES + lane] = numbers[(i - 1) * LANES + lane];
      }
  }

  Candidate candidate(int64_t index) const {
    index = std::min(index, count - 1);
    Vec zero{};
    Vec scale = distinct ? load(scales + index * LANES) : stored(index, zero);
    Candidate found = candidate_of_stored(search.format, scale, zero);
    return candidate_of(found.scale * unit, zero);
  }
};

// Whether clipping the largest value alone costs more than the best from here on, which only grows:
// codes reach no further than the shrunk range and one scale, whatever the zero point is.
static bool clips_too_much(const GridSearch& search, Vec largest, float factor, Vec best,
                           IVec is_unit) {
  Vec over = largest / search.expand - largest * (factor * (1 + 2 / search.clip_steps));
  over = larger(over, Vec{});
  Vec exponent = log2_of(over) * search.norm;
  // Of what is below the normal numbers the logarithm is too large: it bounds nothing.
  IVec known = (over >= splat(std::numeric_limits<float>::min())) & (exponent > splat(-126));
  Vec least = select(known, power_bound(exponent, search.norm), Vec{});
  return all((least > best) | (best == Vec{}) | ~is_unit);
}

// Memory of a thread.
struct Room {
  float *values, *weights, *scales, *numbers;
};

static void search_block(const GridSearch& search, int64_t block, SumErrors sum, SumErrors square,
                         const Room& room, GridReport& report) {
  const Box& box = search.box;
  const bool sums_only = search.errors != nullptr;
  const Vec infinity = splat(std::numeric_limits<float>::infinity());
  int64_t first = block * LANES, count = std::min<int64_t>(LANES, box.units() - first);
  Steps steps{search,
              {by_group(box, search.low, block), by_group(box, search.high, block)},
              by_group(box, search.units, block),
              search.format.scale_type != ANY_SCALE && !sums_only && !search.known_errors,
              room.scales,
              room.numbers,
              search.steps};
  if (steps.distinct) steps.find_distinct();
  Vec largest = larger(steps.range[1], -steps.range[0]) * steps.unit;
  const Vec noise = largest * (search.noise / search.expand);
  IVec is_unit{};
  for (int lane = 0; lane < LANES; lane++) is_unit[lane] = lane < count ? -1 : 0;
  if (!search.known_errors) {
    load_block<false>(box, block, room.values);
    for (int64_t i = 0; i < box.run_length; i++)
      store(room.values + i * LANES, load(room.values + i * LANES) * steps.unit);
    if (box.weights) load_block<true>(box, block, room.weights);
  }
  Vec total_weight = splat(float(box.size));
  if (!search.known_errors && box.weights) {
    total_weight = Vec{};
    for (int64_t i = 0; i < box.run_length; i++) total_weight += load(room.weights + i * LANES);
  }
  Best best{infinity, infinity, Vec{}, splat(1)};
  IVec doubtful{};
  for (int64_t step = 0; step < steps.count; step += TILE) {
    Candidate candidates[TILE];
    Vec errors[TILE];
    for (int t = 0; t < TILE; t++) candidates[t] = steps.candidate(step + t);
    int64_t tile = std::min<int64_t>(TILE, steps.count - step);
    if (search.known_errors) {
      for (int t = 0; t < tile; t++)
        for (int lane = 0; lane < count; lane++)
          errors[t][lane] = float(search.known_errors[(first + lane) * search.steps + step + t]);
    } else {
      bool pays = true;
      if (search.squares_first && step > 0 && !sums_only) {
        square(search, room.values, room.weights, candidates, errors);
        pays = may_be_better(errors, total_weight, search.norm,
                             doubt_limit(search, best.error, total_weight, noise), is_unit);
      }
      if (pays) {
        sum(search, room.values, room.weights, candidates, errors);
        report.evaluated += tile * count;
      } else {
        tile = 0;
      }
    }
    bool falls = false;
    for (int t = 0; t < tile; t++) {
      if (sums_only) {
        for (int lane = 0; lane < count; lane++)
          search.errors[(first + lane) * search.steps + step + t] = errors[t][lane];
        continue;
      }
      Vec error = errors[t], scale = candidates[t].scale;
      IVec better = (error < best.error) & is_unit;
      uint32_t gaining = bits_of_lanes(better);
      falls |= gaining != 0;
      if (steps.distinct) {
        for (; gaining; gaining &= gaining - 1) {
          const int lane = __builtin_ctz(gaining);
          const int64_t its_step = int64_t(steps.numbers[(step + t) * LANES + lane]);
          report.gains[its_step] = 1;
          best.factor[lane] = search.factors[its_step];
        }
      } else if (gaining) {
        report.gains[step + t] = 1;
        best.factor = select(better, splat(search.factors[step + t]), best.factor);
      }
      // The same scale again, as rounded scales come, is no other candidate.
      Vec loser = larger(best.error, error);
      IVec nearer = (scale != best.scale) & (loser < best.next);
      best.next = select(nearer, loser, best.next);
      best.error = select(better, error, best.error);
      best.scale = select(better, scale, best.scale);
      // One over so small a scale is no number.
      doubtful |= (scale < splat(std::numeric_limits<float>::min())) & (largest > Vec{});
    }
    // While errors still fall the bound is far from them.
    if (sums_only || !search.clip_steps || falls || step + TILE >= steps.count) continue;
    const Vec limit = doubt_limit(search, best.error, total_weight, noise);
    if (clips_too_much(search, largest, search.factors[step + TILE], limit, is_unit)) break;
  }
  if (sums_only) return;
  doubtful |= (best.next < infinity) &
              (best.next <= doubt_limit(search, best.error, total_weight, noise));
  Vec found[2];
  for (int end = 0; end < 2; end++) found[end] = steps.range[end] * best.factor;
  for (int lane = 0; lane < count; lane++) {
    search.best_low[first + lane] = found[0][lane];
    search.best_high[first + lane] = found[1][lane];
    search.doubtful[first + lane] = doubtful[lane] != 0;
  }
}

// One report for each part.
extern "C" void search_grid(const GridSearch* search, int64_t parts, GridReport* reports) {
  const Box& box = search->box;
  bool weighted = box.weights != nullptr;
  SumErrors sum = search->format.integer ? choose_sum<true>(search->norm, weighted)
                                         : choose_sum<false>(search->norm, weighted);
  SumErrors square = search->format.integer ? choose_sum<true, SQUARE>(weighted)
                                            : choose_sum<false, SQUARE>(weighted);
  in_parallel(box.blocks(), parts, [&](int64_t part, int64_t first, int64_t last) {
    Scratch values(box.run_length), weights(weighted ? box.run_length : 0);
    Scratch scales(search->steps), numbers(search->steps);
    const Room room{values.data, weights.data, scales.data, numbers.data};
    // Written once: reports of several threads share a line of the cache.
    std::vector<uint8_t> gains(search->steps);
    GridReport report{gains.data(), 0};
    for (int64_t block = first; block < last; block++)
      search_block(*search, block, sum, square, room, report);
    std::copy(gains.begin(), gains.end(), reports[part].gains);
    reports[part].evaluated = report.evaluated;
  });
}
