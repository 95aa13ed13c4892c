// Sums over units for candidate scales, of which projection and comparison of errors are made.
#pragma once

#include "box.h"
#include "format.h"
#include "parallel.h"
#include "scratch.h"

// Sums of so many values are added to the total at once: fewer roundings.
constexpr int64_t CHUNK = 32;

// A block of units: values in units of their base (sizes for float formats), and their weights.
struct Block {
  float* values;
  float* weights;  // null: all alike
  int64_t length;
};

static inline void load_scaled(const Box& box, const Format& format, int64_t block, Vec factor,
                               Block& target) {
  load_block<false>(box, block, target.values);
  if (target.weights) load_block<true>(box, block, target.weights);
  for (int64_t i = 0; i < target.length; i++) {
    Vec x = load(target.values + i * LANES) * factor;
    store(target.values + i * LANES, format.integer ? x : size_of(x));
  }
}

// With codes q of x at a scale: sum w x q, sum w q^2 and, for RESIDUAL, sum w (x - q scale)^2.
struct Products {
  Vec xq, qq, residual;
};

template <bool INTEGER, bool WEIGHTED, bool RESIDUAL, int TILE, typename Add>
static inline void sum_products(const Format& format, const Block& block, const Candidate* c,
                                Add add) {
  for (int64_t begin = 0; begin < block.length; begin += CHUNK) {
    int64_t end = std::min(begin + CHUNK, block.length);
    Products sums[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) sums[t].xq = sums[t].qq = sums[t].residual = Vec{};
    for (int64_t i = begin; i < end; i++) {
      Vec x = load(block.values + i * LANES);
      Vec w = WEIGHTED ? load(block.weights + i * LANES) : Vec{};
      Vec wx = WEIGHTED ? w * x : x;
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) {
        Vec q = code_of<INTEGER>(format, x, c[t]);
        sums[t].xq += wx * q;
        sums[t].qq += WEIGHTED ? w * q * q : q * q;
        if (RESIDUAL) {
          Vec rest = x - q * c[t].scale;
          sums[t].residual += WEIGHTED ? w * rest * rest : rest * rest;
        }
      }
    }
    for (int t = 0; t < TILE; t++) add(t, sums[t]);
  }
}

// -- the sums themselves, for candidates that are given ------------------------------------------

struct SumTask {
  Box box;
  Format format;
  const float* inverse_base;  // of each group
  const float* ratios;        // (count, groups), in units of the base
  const float* zeros;         // the same; null: none
  int64_t count;
  double* sums;  // (3 * count + 1, units): xq, qq, residuals, and what clipping alone costs at the
                 // last candidate, sum w (|x| - highest * ratio)_+^2
};

template <bool INTEGER, bool WEIGHTED>
static void sum_block(const SumTask& task, int64_t index, Block& block) {
  const Box& box = task.box;
  int64_t first = index * LANES, count = std::min<int64_t>(LANES, box.units() - first);
  load_scaled(box, task.format, index, by_group(box, task.inverse_base, index), block);
  auto put = [&](int64_t row, const double* lanes) {
    std::memcpy(task.sums + row * box.units() + first, lanes, count * sizeof(double));
  };
  for (int64_t k = 0; k < task.count; k++) {
    Vec ratio = by_group(box, task.ratios + k * box.groups, index), zero{};
    if (task.zeros) zero = by_group(box, task.zeros + k * box.groups, index);
    Candidate candidate = candidate_of(ratio, zero);
    double totals[3][LANES] = {};
    sum_products<INTEGER, WEIGHTED, true, 1>(
        task.format, block, &candidate, [&](int, const Products& part) {
          for (int lane = 0; lane < LANES; lane++) {
            totals[0][lane] += part.xq[lane];
            totals[1][lane] += part.qq[lane];
            totals[2][lane] += part.residual[lane];
          }
        });
    for (int kind = 0; kind < 3; kind++) put(kind * task.count + k, totals[kind]);
    if (k + 1 < task.count) continue;
    double clipped[LANES] = {};
    for (int64_t i = 0; i < block.length; i++) {
      Vec over = size_of(load(block.values + i * LANES)) - task.format.highest * ratio;
      over = larger(over, Vec{});
      over *= WEIGHTED ? load(block.weights + i * LANES) * over : over;
      for (int lane = 0; lane < LANES; lane++) clipped[lane] += over[lane];
    }
    put(3 * task.count, clipped);
  }
}

// Calls work(index, block) for all blocks, with memory for one at a time in each part.
template <typename Work>
static void for_blocks(const Box& box, int64_t parts, Work work) {
  in_parallel(box.blocks(), parts, [&](int64_t, int64_t first, int64_t last) {
    Scratch values(box.run_length), weights(box.weights ? box.run_length : 0);
    Block block{values.data, box.weights ? weights.data : nullptr, box.run_length};
    for (int64_t index = first; index < last; index++) work(index, block);
  });
}

extern "C" void sum_candidates(const SumTask* task, int64_t parts) {
  bool weighted = task->box.weights != nullptr;
  auto work = task->format.integer
                  ? (weighted ? sum_block<true, true> : sum_block<true, false>)
                  : (weighted ? sum_block<false, true> : sum_block<false, false>);
  for_blocks(task->box, parts,
             [&](int64_t index, Block& block) { work(*task, index, block); });
}
