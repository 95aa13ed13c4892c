// Sums over columns that are coupled by a matrix, for many scales of each row: from one scale to the
// next few codes change, and only what those change is added.
#pragma once

#include "format.h"
#include "parallel.h"
#include "scratch.h"

struct CoupledTask {
  Format format;
  const float* values;    // (blocks, rows, width); columns behind the end of a block are zeros
  const float* products;  // the same: M x
  const float* slopes;    // the same: what else a code is multiplied by
  const float* matrix;    // (blocks, width, width), symmetric
  const float* factors;   // (blocks, width, rank): M of two blocks is the product of theirs
  const float* scales;    // (rows / rows_of_group, count), not 0
  const float* zeros;     // the same; null: none
  int64_t blocks;
  int64_t rows;
  int64_t width;  // a multiple of LANES
  int64_t rank;   // a multiple of LANES; 0 where there is one block
  int64_t rows_of_group;
  int64_t count;
  float* shares;  // (rows, count, rank), zeros: sums over blocks of their factors with codes
  double* sums;   // (3, rows, count), zeros: q'Mq, q'Mx, and q times the slopes
};

// What belongs to the codes of one row of a block at one scale.
struct Coupled {
  float* codes;
  float* products;  // of the block of the matrix with them
  float* share;     // of the factors with them
  double quadratic, linear, slope;
};

static inline float dot(const float* a, const float* b, int64_t count) {
  Vec sum{};
  for (int64_t i = 0; i < count; i += LANES) sum += load(a + i) * load(b + i);
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}

static inline void add_times(float* target, float factor, const float* source, int64_t count) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += LANES)
    store(target + i, load(target + i) + load(source + i) * factor);
}

// One row of a part, and what its codes are multiplied by.
struct PartOfRow {
  const float* values;
  const float* products;  // M x
  const float* slopes;
  const float* matrix;   // of the part, (width, width)
  const float* factors;  // of the part, (width, rank)
  int64_t width, rank;
};

// What rounds values at a scale, as compressed-tensors does it: the quotient is rounded right, so
// that ties stay ties.
template <bool INTEGER>
struct Rounding {
  const Format& format;
  Vec divisor, inverse;
  Candidate of_quotient;
  Rounding(const Format& format, float scale, float zero)
      : format(format),
        divisor(splat(scale)),
        inverse(splat(1 / scale)),
        of_quotient{splat(1), splat(1), splat(zero) + FAR} {}
  Vec code(Vec x) const {
    Vec quotient = x * inverse;
    quotient += (x - quotient * divisor) * inverse;
    Vec code = code_of<INTEGER>(format, quotient, of_quotient);
    if (!INTEGER) code = from_bits(bits_of(code) | (bits_of(quotient) & INT32_MIN));
    return code;
  }
};

template <bool INTEGER>
static void try_scale(const Format& format, const PartOfRow& part, float scale, float zero,
                      Coupled& state) {
  const Rounding<INTEGER> rounding(format, scale, zero);
  double quadratic = 0, linear = 0, slope = 0;
  for (int64_t i = 0; i < part.width; i += LANES) {
    Vec code = rounding.code(load(part.values + i));
    Vec change = code - load(state.codes + i);
    uint32_t changed = bits_of_lanes(change != Vec{});
    if (!changed) continue;
    store(state.codes + i, code);
    float steps[LANES];
    store(steps, change);
    for (; changed; changed &= changed - 1) {
      const int lane = __builtin_ctz(changed);
      const int64_t at = i + lane;
      const float step = steps[lane], *column = part.matrix + at * part.width;
      quadratic += double(step) * double(2 * state.products[at] + step * column[at]);
      linear += double(step) * part.products[at];
      slope += double(step) * part.slopes[at];
      add_times(state.products, step, column, part.width);
      add_times(state.share, step, part.factors + at * part.rank, part.rank);
    }
  }
  state.quadratic += quadratic;
  state.linear += linear;
  state.slope += slope;
}

static void negate(float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(numbers + i, -load(numbers + i));
}

// Under the other sign of the scale nearly all codes are the same but for it.
static void negate(Coupled& state, int64_t width, int64_t rank) {
  negate(state.codes, width);
  negate(state.products, width);
  negate(state.share, rank);
  state.linear = -state.linear;
  state.slope = -state.slope;
}

template <bool INTEGER>
static void sum_row(const CoupledTask& task, int64_t block, int64_t row, Coupled& state) {
  const int64_t group = row / task.rows_of_group, width = task.width, rank = task.rank;
  const int64_t source = (block * task.rows + row) * width;
  const PartOfRow part{task.values + source, task.products + source, task.slopes + source,
                       task.matrix + block * width * width, task.factors + block * width * rank,
                       width, rank};
  std::memset(state.codes, 0, width * sizeof(float));
  std::memset(state.products, 0, width * sizeof(float));
  std::memset(state.share, 0, rank * sizeof(float));
  state.quadratic = state.linear = state.slope = 0;
  const float* scales = task.scales + group * task.count;
  for (int64_t k = 0; k < task.count; k++) {
    if (k && (scales[k] < 0) != (scales[k - 1] < 0)) negate(state, width, rank);
    float zero = task.zeros ? task.zeros[group * task.count + k] : 0;
    try_scale<INTEGER>(task.format, part, scales[k], zero, state);
    // The blocks on the diagonal are no product of factors.
    double own = rank ? dot(state.share, state.share, rank) : 0;
    if (rank) add_times(task.shares + (row * task.count + k) * rank, 1, state.share, rank);
    const double found[3] = {state.quadratic - own, state.linear, state.slope};
    for (int kind = 0; kind < 3; kind++)
      task.sums[(kind * task.rows + row) * task.count + k] += found[kind];
  }
}

// Block by block, since all rows need the same part of the matrix, which fills a cache.
extern "C" void sum_coupled(const CoupledTask* task, int64_t parts) {
  in_parallel(task->rows, parts, [&](int64_t, int64_t first, int64_t last) {
    Scratch codes(task->width / LANES), products(task->width / LANES), share(task->rank / LANES);
    Coupled state{codes.data, products.data, share.data, 0, 0, 0};
    for (int64_t block = 0; block < task->blocks; block++)
      for (int64_t row = first; row < last; row++)
        task->format.integer ? sum_row<true>(*task, block, row, state)
                             : sum_row<false>(*task, block, row, state);
    if (!task->rank) return;
    for (int64_t i = first * task->count; i < last * task->count; i++) {
      const float* all = task->shares + i * task->rank;
      task->sums[i] += dot(all, all, task->rank);
    }
  });
}
