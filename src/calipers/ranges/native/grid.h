// The shrink grid: a block of units is brought into the cache once for all candidates.
#pragma once

#include <cmath>
#include <limits>

#include "power.h"
#include "sums.h"

// Candidates of one loop over the values, whose sums stay in registers.
constexpr int TILE = 4;

struct GridSearch {
  Box box;
  Format format;
  const float* low;  // expanded range of each group
  const float* high;
  const float* factors;  // of each step
  int64_t steps;
  float norm;
  float expand;
  float clip_steps;  // scales that the whole range spans; 0: clipping bounds nothing
  int64_t squares_first;  // whether candidates are dismissed by their squared errors, norm > 2
  float doubt;       // part of the smallest error that leaves no doubt about the best step
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
  Candidate c[TILE];
  for (int t = 0; t < TILE; t++) c[t] = candidates[t], errors[t] = Vec{};
  for (int64_t begin = 0; begin < search.box.run_length; begin += CHUNK) {
    int64_t end = std::min(begin + CHUNK, search.box.run_length);
    Vec sums[TILE] = {};
    for (int64_t i = begin; i < end; i++) {
      Vec value = load(values + i * LANES);
      Vec weight = WEIGHTED ? load(weights + i * LANES) : Vec{};
      for (int t = 0; t < TILE; t++) {
        Vec error = error_of<INTEGER>(search.format, value, c[t]);
        Vec loss = power_of<POWER>(error, search.norm);
        if (WEIGHTED)
          sums[t] += loss * weight;
        else
          sums[t] += loss;
      }
    }
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
  if (norm < 2) return choose_sum<INTEGER, BELOW_TWO>(weighted);
  if (norm > 4) return choose_sum<INTEGER, STEEP>(weighted);
  return choose_sum<INTEGER, ABOVE_TWO>(weighted);
}

struct Best {
  Vec error, next, scale, factor;
};

// By the inequality of power means sum w |d|^p >= (sum w)^(1 - p/2) (sum w d^2)^(p/2), p > 2: whether
// some of a tile's squared errors leave room for a smaller error than the best.
static bool may_be_better(const Vec* squares, Vec total_weight, float norm, Vec best, IVec is_unit) {
  IVec possible{};
  for (int t = 0; t < TILE; t++) {
    Vec exponent = log2_of(squares[t]) * (norm / 2) + log2_of(total_weight) * (1 - norm / 2);
    // Less than rounding takes away; and near the smallest numbers the bound says nothing.
    Vec bound = exp2_of(smaller(larger(exponent, splat(-126)), splat(126))) * (1 - 1e-4f);
    possible |= (bound <= best) | (exponent < splat(-100)) | (squares[t] != squares[t]);
  }
  return any(possible & is_unit);
}

static void search_block(const GridSearch& search, int64_t block, SumErrors sum, SumErrors square,
                         float* values, float* weights, GridReport& report) {
  const Box& box = search.box;
  const bool sums_only = search.errors != nullptr;
  const Vec infinity = splat(std::numeric_limits<float>::infinity());
  int64_t first = block * LANES, count = std::min<int64_t>(LANES, box.units() - first);
  Vec range[2] = {by_group(box, search.low, block), by_group(box, search.high, block)};
  Vec largest = larger(range[1], -range[0]);
  IVec is_unit{};
  for (int lane = 0; lane < LANES; lane++) is_unit[lane] = lane < count ? -1 : 0;
  if (!search.known_errors) {
    load_block<false>(box, block, values);
    if (box.weights) load_block<true>(box, block, weights);
  }
  Vec total_weight = splat(float(box.size));
  if (search.squares_first && box.weights) {
    total_weight = Vec{};
    for (int64_t i = 0; i < box.run_length; i++) total_weight += load(weights + i * LANES);
  }
  Best best{infinity, infinity, Vec{}, splat(1)};
  IVec doubtful{};
  for (int64_t step = 0; step < search.steps; step += TILE) {
    Candidate candidates[TILE];
    Vec errors[TILE];
    for (int t = 0; t < TILE; t++) {
      Vec shrunk[2];
      shrink_range(range, search.factors[std::min(step + t, search.steps - 1)], shrunk);
      candidates[t] = qparams(search.format, shrunk[0], shrunk[1]);
    }
    int64_t tile = std::min<int64_t>(TILE, search.steps - step);
    if (search.known_errors) {
      for (int t = 0; t < tile; t++)
        for (int lane = 0; lane < count; lane++)
          errors[t][lane] = float(search.known_errors[(first + lane) * search.steps + step + t]);
    } else {
      bool pays = true;
      if (search.squares_first && step > 0 && !sums_only) {
        square(search, values, weights, candidates, errors);
        pays = may_be_better(errors, total_weight, search.norm, best.error, is_unit);
      }
      if (pays) {
        sum(search, values, weights, candidates, errors);
        report.evaluated += tile * count;
      } else {
        tile = 0;
      }
    }
    for (int t = 0; t < tile; t++) {
      if (sums_only) {
        for (int lane = 0; lane < count; lane++)
          search.errors[(first + lane) * search.steps + step + t] = errors[t][lane];
        continue;
      }
      Vec error = errors[t], scale = candidates[t].scale;
      IVec better = (error < best.error) & is_unit;
      if (any(better)) report.gains[step + t] = 1;
      // The same scale again, as rounded scales come, is no other candidate.
      Vec loser = larger(best.error, error);
      IVec nearer = (scale != best.scale) & (loser < best.next);
      best.next = select(nearer, loser, best.next);
      best.error = select(better, error, best.error);
      best.scale = select(better, scale, best.scale);
      best.factor = select(better, splat(search.factors[step + t]), best.factor);
      // One over so small a scale is no number.
      doubtful |= (scale < splat(std::numeric_limits<float>::min())) & (largest > Vec{});
    }
    if (sums_only || !search.clip_steps || step + TILE >= search.steps) continue;
    // What clipping the largest value alone costs only grows from here on: codes reach no further
    // than the shrunk range and one scale, whatever the zero point is.
    float factor = search.factors[step + TILE];
    Vec over = largest / search.expand - largest * (factor * (1 + 2 / search.clip_steps));
    Vec least{};
    over = larger(over, Vec{});
    for (int lane = 0; lane < LANES; lane++)
      least[lane] = over[lane] > 0 ? std::pow(over[lane], search.norm) * (1 - 1e-4f) : 0;
    if (all((least > best.error) | (best.error == Vec{}) | ~is_unit)) break;
  }
  if (sums_only) return;
  doubtful |= best.next <= best.error * (1 + search.doubt);
  Vec found[2];
  for (int end = 0; end < 2; end++) found[end] = range[end] * best.factor;
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
    for (int64_t block = first; block < last; block++)
      search_block(*search, block, sum, square, values.data, weights.data, reports[part]);
  });
}
