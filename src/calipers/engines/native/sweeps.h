// Sweeps over the groups of rows that a matrix couples: one group after the other is given the best
// of some scales, the others of its row as they are. Rows know nothing of one another, and are
// worked on a tile at a time, so that a part of the matrix serves all rows of a tile.
#pragma once

#include <cmath>
#include <limits>

#include "hessian.h"

// Columns that a matrix is multiplied by at a time: it comes in panels of so many.
constexpr int64_t PANEL = 16;
// Rows of a tile; rows multiplied at a time, whose sums fill the registers.
constexpr int64_t TILE_ROWS = 24;
constexpr int ROWS_AT_ONCE = 12 * LANES / PANEL;

struct SweepTask {
  Format format;
  const float* values;   // (rows, parts, width), parts = groups * blocks; zeros behind their ends
  const float* matrix;   // (parts, width, width), symmetric
  const float* factors;  // (parts, width, rank): M of two parts is the product of theirs
  const float* matrix_panels;  // (parts, width / PANEL, width, PANEL): the matrix
  const float* factor_panels;  // (parts, rank / PANEL, width, PANEL): the factors
  const float* back_panels;    // (parts, width / PANEL, rank, PANEL): the factors transposed
  const float* start;        // (rows, groups): a good scale, not 0
  const float* start_zeros;  // the same; null: none
  const float* plain;        // (rows, groups): that of minimum and maximum
  const float* plain_zeros;  // the same; null: none
  const float* candidates;       // (rows, groups, count), not 0
  const float* candidate_zeros;  // the same; null: none
  const uint8_t* fresh;  // (count): whether a candidate is far from the one before, near the start
  int64_t rows;
  int64_t groups;
  int64_t blocks;  // parts of a group, which have one scale
  int64_t width;   // a multiple of PANEL
  int64_t rank;    // a multiple of PANEL; 0 where there is one part
  int64_t count;
  float* scales;  // (rows, groups): what is found
  float* zeros;   // the same; null: none
  // What is known of the rows.
  float* products;   // (rows, parts, width): the block of M of a part, times its values
  float* applied;    // the same, times its codes with the scale at the start
  float* of_values;  // (rows, parts, rank): of factors and values; used where blocks > 1
  // With the scales found so far.
  float* shares;   // (rows, groups, rank): of factors and errors, summed over blocks
  float* totals;   // (rows, rank): summed over groups
  double* own;     // (rows, groups): d'Md of each group
  double* limits;  // the same with the scale of minimum and maximum, which none exceeds

  int64_t parts() const { return groups * blocks; }
};

// Sums of some rows, a vector each of the columns of a panel.
template <int ROWS>
struct PanelSums {
  static constexpr int VECTORS = PANEL / LANES;
  Vec sums[ROWS][VECTORS];

  PanelSums() {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) sums[r][v] = Vec{};
  }

  // Add values of the rows times lines of the panel (inner, PANEL), from one to another.
  void add(const float* a, int64_t stride, const float* panel, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      Vec b[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) b[v] = load(panel + k * PANEL + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const Vec factor = splat(a[r * stride + k]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[r][v] += factor * b[v];
      }
    }
  }
};

// target (rows, panels * PANEL) = a (rows, inner) times panels (panels, inner, PANEL).
template <int ROWS>
static inline void multiply_rows(const float* a, int64_t stride, int64_t inner, const float* panel,
                                 float* target, int64_t target_stride) {
  PanelSums<ROWS> total;
  total.add(a, stride, panel, 0, inner);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < total.VECTORS; v++)
      store(target + r * target_stride + v * LANES, total.sums[r][v]);
}

static void multiply(const float* a, int64_t stride, int64_t rows, int64_t inner,
                     const float* panels, int64_t columns, float* target, int64_t target_stride) {
  for (int64_t at = 0; at < columns; at += PANEL, panels += inner * PANEL) {
    int64_t row = 0;
    for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE)
      multiply_rows<ROWS_AT_ONCE>(a + row * stride, stride, inner, panels,
                                  target + row * target_stride + at, target_stride);
    for (; row < rows; row++)
      multiply_rows<1>(a + row * stride, stride, inner, panels, target + row * target_stride + at,
                       target_stride);
  }
}

// Of each row a (inner values) the sum over panels of a'Ma, for a symmetric M: what lies above the
// panel of a column counts twice, what lies below not at all.
template <int ROWS>
static inline void quadratic_rows(const float* a, int64_t stride, int64_t inner,
                                  const float* panels, double* found) {
  for (int64_t at = 0; at < inner; at += PANEL, panels += inner * PANEL) {
    PanelSums<ROWS> total;
    total.add(a, stride, panels, 0, at);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int v = 0; v < total.VECTORS; v++) total.sums[r][v] += total.sums[r][v];
    total.add(a, stride, panels, at, at + PANEL);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      Vec products{};
#pragma GCC unroll 2
      for (int v = 0; v < total.VECTORS; v++)
        products += total.sums[r][v] * load(a + r * stride + at + v * LANES);
      float sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += products[lane];
      found[r] += sum;
    }
  }
}

static void add_quadratic(const float* a, int64_t stride, int64_t rows, int64_t inner,
                          const float* panels, double* found) {
  int64_t row = 0;
  for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE)
    quadratic_rows<ROWS_AT_ONCE>(a + row * stride, stride, inner, panels, found + row);
  for (; row < rows; row++)
    quadratic_rows<1>(a + row * stride, stride, inner, panels, found + row);
}

static inline double dot_in_double(const float* a, const float* b, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i += PANEL) total += dot(a + i, b + i, PANEL);
  return total;
}

// A tile of rows at work on one group.
template <bool INTEGER>
class Tile {
 public:
  Tile(const SweepTask& task)
      : task(task),
        whole(task.blocks * task.width),
        errors(vectors(TILE_ROWS * whole)),
        of_errors(vectors(TILE_ROWS * whole)),
        codes(vectors(TILE_ROWS * task.width)),
        targets(vectors(TILE_ROWS * task.width)),
        slopes(vectors(TILE_ROWS * task.width)),
        others(vectors(TILE_ROWS * task.rank)),
        part_shares(vectors(TILE_ROWS * task.rank)),
        new_shares(vectors(TILE_ROWS * task.rank)),
        code_shares(vectors(task.blocks > 1 ? TILE_ROWS * task.count * task.rank : 0)),
        walked(vectors(2 * task.width + task.rank)),
        starts(task.count),
        ends(task.count),
        sums(TILE_ROWS * task.count * 3) {}

  // Begin with the scales as they are, or with those of minimum and maximum where d'Md is less.
  void begin(int64_t group, int64_t first_row, int64_t number) {
    first = first_row;
    rows = number;
    for (int64_t block = 0; block < task.blocks; block++) {
      const int64_t part = group * task.blocks + block;
      multiply(values(0, part), stride(), rows, task.width, matrix_panels(part), task.width,
               task.products + at(0, part), stride());
      if (task.blocks > 1)
        multiply(values(0, part), stride(), rows, task.width, factor_panels(part), task.rank,
                 task.of_values + of_part(0, part), task.parts() * task.rank);
    }
    judge</*MULTIPLY=*/true>(group, task.start, task.start_zeros);
    for (int64_t r = 0; r < rows; r++) {
      apply(r, group);
      keep(r, group, task.start, task.start_zeros);
    }
    judge</*MULTIPLY=*/false, /*SHARES=*/false>(group, task.plain, task.plain_zeros);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t here = of_group(r, group);
      task.limits[here] = own[r];
      if (!(task.own[here] <= own[r])) {
        if (task.blocks == 1)
          multiply(errors.data + r * whole, whole, 1, task.width, factor_panels(group), task.rank,
                   new_shares.data + r * task.rank, task.rank);
        keep(r, group, task.plain, task.plain_zeros);
      }
      float* total = task.totals + (first + r) * task.rank;
      if (group == 0) std::memset(total, 0, task.rank * sizeof(float));
      add_times(total, 1, task.shares + here * task.rank, task.rank);
    }
  }

  // Choose among the candidates of a group.
  void sweep(int64_t group, int64_t first_row, int64_t number) {
    first = first_row;
    rows = number;
    score(group);
    choose(group);
    judge(group, best_scales, task.zeros ? best_zeros : nullptr, /*of_tile=*/true);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t here = of_group(r, group);
      const float* share = task.shares + here * task.rank;
      const float* its_share = new_shares.data + r * task.rank;
      const float* other = others.data + r * task.rank;
      double coupled = 0;
      for (int64_t i = 0; i < task.rank; i++)
        coupled += double(other[i]) * double(its_share[i] - share[i]);
      const double gain = 2 * coupled + own[r] - task.own[here];
      // A comparison with NaN (a scale that overflowed, a group of zeros) fails.
      if (gain < 0 && own[r] <= task.limits[here]) {
        task.scales[here] = best_scales[r];
        if (task.zeros) task.zeros[here] = best_zeros[r];
        share = its_share;
      }
      float* total = task.totals + (first + r) * task.rank;
      std::memcpy(total, other, task.rank * sizeof(float));
      add_times(total, 1, share, task.rank);
    }
  }

 private:
  const SweepTask& task;
  const int64_t whole;  // columns of a group
  int64_t first = 0, rows = 0;
  Scratch errors, of_errors, codes, targets, slopes, others, part_shares, new_shares, code_shares,
      walked;
  // A code that changes by one: the column, one more than the candidate above it, and INT32_MIN
  // where it is by less than 0. NOTHING fills up what is made at once.
  static constexpr int AT_ONCE = 4, LEAST_AT_ONCE = 2, BEHIND_COLUMN = 16;
  static constexpr int32_t MOST_COLUMN = (1 << BEHIND_COLUMN) - 1, NOTHING = 0;
  std::vector<int32_t> found, changes;  // as they are found, and by candidate
  std::vector<int64_t> starts, ends;    // of each candidate's
  // 1, -1 or 0, without a branch that nobody foresees.
  static float step_of(int32_t change) {
    const uint32_t one = 0x3f800000u & (0u - uint32_t(change != NOTHING));
    return float_of_bits(one | (uint32_t(change) & 0x80000000u));
  }
  static int32_t candidate_of(int32_t change) { return (change << 1 >> (BEHIND_COLUMN + 1)) - 1; }
  std::vector<double> sums;  // (rows, count, 3): q'Mq, q'Mx, and q times what couples groups
  double own[TILE_ROWS], constant[TILE_ROWS];
  float best_scales[TILE_ROWS], best_zeros[TILE_ROWS];

  static int64_t vectors(int64_t floats) { return floats / LANES + 1; }
  int64_t stride() const { return task.parts() * task.width; }
  int64_t at(int64_t r, int64_t part) const { return (first + r) * stride() + part * task.width; }
  int64_t of_part(int64_t r, int64_t part) const {
    return ((first + r) * task.parts() + part) * task.rank;
  }
  int64_t of_group(int64_t r, int64_t group) const { return (first + r) * task.groups + group; }
  const float* values(int64_t r, int64_t part) const { return task.values + at(r, part); }
  const float* matrix_panels(int64_t part) const {
    return task.matrix_panels + part * task.width * task.width;
  }
  const float* factor_panels(int64_t part) const {
    return task.factor_panels + part * task.width * task.rank;
  }
  const float* back_panels(int64_t part) const {
    return task.back_panels + part * task.width * task.rank;
  }
  float zero_of(const float* zeros, int64_t r, int64_t group) const {
    return zeros ? zeros[of_group(r, group)] : 0;
  }

  // Errors d of a group with some scales, and d'Md; the matrix and the factors times them if asked
  // for, the latter where d'Md needs them as well.
  template <bool MULTIPLY = false, bool SHARES = true>
  void judge(int64_t group, const float* scales, const float* zeros, bool of_tile = false) {
    const int64_t width = task.width, rank = task.rank;
    std::memset(new_shares.data, 0, rows * rank * sizeof(float));
    for (int64_t r = 0; r < rows; r++) own[r] = 0;
    for (int64_t block = 0; block < task.blocks; block++) {
      const int64_t part = group * task.blocks + block;
      float* d = errors.data + block * width;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t here = of_tile ? r : of_group(r, group);
        const float scale = scales[here];
        const Rounding<INTEGER> rounding(task.format, scale, zeros ? zeros[here] : 0);
        for (int64_t i = 0; i < width; i += LANES) {
          const Vec x = load(values(r, part) + i);
          store(d + r * whole + i, rounding.code(x) * scale - x);
        }
      }
      if (MULTIPLY) {
        float* product = of_errors.data + block * width;
        multiply(d, whole, rows, width, matrix_panels(part), width, product, whole);
        for (int64_t r = 0; r < rows; r++)
          own[r] += dot_in_double(d + r * whole, product + r * whole, width);
      } else {
        add_quadratic(d, whole, rows, width, matrix_panels(part), own);
      }
      if (!SHARES && task.blocks == 1) return;
      multiply(d, whole, rows, width, factor_panels(part), rank, part_shares.data, rank);
      for (int64_t r = 0; r < rows; r++) {
        const float* share = part_shares.data + r * rank;
        if (task.blocks > 1) own[r] -= dot_in_double(share, share, rank);
        add_times(new_shares.data + r * rank, 1, share, rank);
      }
    }
    if (task.blocks == 1) return;
    for (int64_t r = 0; r < rows; r++) {
      const float* share = new_shares.data + r * rank;
      own[r] += dot_in_double(share, share, rank);
    }
  }

  // The matrix times the codes of a row at the start, of the errors that were judged last.
  void apply(int64_t r, int64_t group) {
    const float scale = task.start[of_group(r, group)];
    for (int64_t block = 0; block < task.blocks; block++) {
      const int64_t start = at(r, group * task.blocks + block);
      const float* product = of_errors.data + r * whole + block * task.width;
      for (int64_t i = 0; i < task.width; i += LANES) {
        const Vec sum = load(product + i) + load(task.products + start + i);
        store(task.applied + start + i, sum / scale);
      }
    }
  }

  // Take the scale of a row that was judged last.
  void keep(int64_t r, int64_t group, const float* scales, const float* zeros) {
    const int64_t here = of_group(r, group);
    task.scales[here] = scales[here];
    if (task.zeros) task.zeros[here] = zeros[here];
    task.own[here] = own[r];
    std::memcpy(task.shares + here * task.rank, new_shares.data + r * task.rank,
                task.rank * sizeof(float));
  }

  // The sums of all candidates of a group.
  void score(int64_t group) {
    const int64_t width = task.width, rank = task.rank, count = task.count;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t r = 0; r < rows; r++) {
      constant[r] = 0;
      float* other = others.data + r * rank;
      std::memcpy(other, task.totals + (first + r) * rank, rank * sizeof(float));
      add_times(other, -1, task.shares + of_group(r, group) * rank, rank);
    }
    if (task.blocks > 1)
      std::memset(code_shares.data, 0, rows * count * rank * sizeof(float));
    for (int64_t block = 0; block < task.blocks; block++) {
      const int64_t part = group * task.blocks + block;
      aim(group, part);
      multiply(others.data, rank, rows, rank, back_panels(part), width, slopes.data, width);
      for (int64_t r = 0; r < rows; r++) {
        const Rounding<INTEGER> rounding(task.format, task.start[of_group(r, group)],
                                         zero_of(task.start_zeros, r, group));
        for (int64_t i = 0; i < width; i += LANES)
          store(codes.data + r * width + i, rounding.code(load(values(r, part) + i)));
      }
      if (task.blocks > 1)
        multiply(codes.data, width, rows, width, factor_panels(part), rank, part_shares.data, rank);
      for (int64_t r = 0; r < rows; r++) walk(group, block, r);
    }
    if (task.blocks == 1) return;
    for (int64_t i = 0; i < rows * count; i++) {
      const float* share = code_shares.data + i * rank;
      sums[3 * i] += dot_in_double(share, share, rank);
    }
  }

  // What codes of a part are multiplied by: M x, other blocks of the group among it.
  void aim(int64_t group, int64_t part) {
    const int64_t width = task.width, rank = task.rank;
    if (task.blocks > 1) {
      std::memset(part_shares.data, 0, rows * rank * sizeof(float));
      for (int64_t r = 0; r < rows; r++)
        for (int64_t block = 0; block < task.blocks; block++) {
          const int64_t other = group * task.blocks + block;
          if (other != part)
            add_times(part_shares.data + r * rank, 1, task.of_values + of_part(r, other), rank);
        }
      multiply(part_shares.data, rank, rows, rank, back_panels(part), width, targets.data, width);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* target = targets.data + r * width;
      const float* product = task.products + at(r, part);
      if (task.blocks > 1)
        add_times(target, 1, product, width);
      else
        std::memcpy(target, product, width * sizeof(float));
      constant[r] += dot_in_double(values(r, part), target, width);
    }
  }

  // Go from one candidate to the next, beginning anew at the start where that is nearer.
  void walk(int64_t group, int64_t block, int64_t r) {
    const int64_t width = task.width, count = task.count, part = group * task.blocks + block;
    const int64_t rank = task.blocks > 1 ? task.rank : 0;
    const float* candidates = task.candidates + of_group(r, group) * count;
    const float* zeros =
        task.candidate_zeros ? task.candidate_zeros + of_group(r, group) * count : nullptr;
    const float start = task.start[of_group(r, group)];
    const float start_zero = zero_of(task.start_zeros, r, group);
    const float* codes_now = codes.data + r * width;
    const float* applied_now = task.applied + at(r, part);
    const float* share_now = part_shares.data + r * rank;
    const PartOfRow row{values(r, part),
                        targets.data + r * width,
                        slopes.data + r * width,
                        task.matrix + part * width * width,
                        task.factors + part * width * task.rank,
                        width,
                        rank};
    const double quadratic = dot_in_double(codes_now, applied_now, width);
    const double linear = dot_in_double(codes_now, row.products, width);
    const double slope = dot_in_double(codes_now, row.slopes, width);
    Coupled state{walked.data, walked.data + width, walked.data + 2 * width, 0, 0, 0};
    for (int64_t k = 0, end; k < count; k = end) {
      for (end = k + 1; end < count && !task.fresh[end];) end++;
      std::memcpy(state.codes, codes_now, width * sizeof(float));
      std::memcpy(state.products, applied_now, width * sizeof(float));
      std::memcpy(state.share, share_now, rank * sizeof(float));
      state.quadratic = quadratic;
      state.linear = linear;
      state.slope = slope;
      const float zero = zeros ? zeros[k] : 0;
      const bool goes_on = INTEGER && zero == start_zero && is_next(start, candidates + k, end - k);
      if (!goes_on) {
        if ((candidates[k] < 0) != (start < 0)) negate(state, width, rank);
        try_scale<INTEGER>(task.format, row, candidates[k], zero, state);
      }
      if (INTEGER)
        list_changes(row, goes_on ? start : candidates[k], candidates + k, end - k, zero, state);
      if (goes_on) make_changes(row, 0, state);
      add_sums(r, k, state, rank);
      for (int64_t next = k + 1; next < end; next++) {
        if (INTEGER)
          make_changes(row, next - k, state);
        else
          try_scale<INTEGER>(task.format, row, candidates[next], zeros ? zeros[next] : 0, state);
        add_sums(r, next, state, rank);
      }
    }
  }

  void add_sums(int64_t r, int64_t k, const Coupled& state, int64_t rank) {
    double* sum = sums.data() + (r * task.count + k) * 3;
    sum[0] += state.quadratic;
    sum[1] += state.linear;
    sum[2] += state.slope;
    if (!rank) return;
    // The blocks on the diagonal are no product of factors.
    sum[0] -= dot_in_double(state.share, state.share, rank);
    add_times(code_shares.data + (r * task.count + k) * rank, 1, state.share, rank);
  }

  // Whether a scale is the first of others at equal distances, or about as far in front of it.
  static bool is_next(float scale, const float* scales, int64_t count) {
    if (count < 2 || (scale < 0) != (scales[0] < 0)) return false;
    return std::fabs(scales[0] - scale) <= 1.5f * std::fabs(scales[1] - scales[0]);
  }

  // All changes of codes by one on the way from a scale to the last of others, at equal distances up
  // or down, by the one at which each has been made; the scale may be the first of them. Where a
  // value is halfway between two codes is known up to rounding, which is why what is chosen is
  // judged once more.
  void list_changes(const PartOfRow& row, float scale, const float* scales, int64_t count,
                    float zero, const Coupled& state) {
    const float sign = scale < 0 ? -1 : 1, first_scale = sign * scale;
    const float last_scale = sign * scales[count - 1];
    const int32_t next = scale == scales[0] ? 1 : 0;
    std::fill(ends.begin(), ends.begin() + count, 0);
    std::fill(starts.begin(), starts.begin() + count, 0);
    size_t number = 0;
    if (!(first_scale > 0) || !(last_scale > 0) || last_scale == first_scale) return;
    const bool grows = last_scale > first_scale;
    const float way = grows ? -1.0f : 1.0f;  // of the size of a code
    const Vec per_scale = splat(float(count - next) / (last_scale - first_scale));
    const float most = task.format.highest - zero, least = zero - task.format.lowest;
    for (int64_t i = 0; i < row.width; i += LANES) {
      const Vec x = load(row.values + i) * sign, size = size_of(x);
      const Vec limit = grows ? Vec{} : select(x < Vec{}, splat(least), splat(most));
      const IVec columns = (lane_numbers() + int32_t(i)) |
                           ((bits_of(x) & INT32_MIN) ^ (grows ? INT32_MIN : 0));
      Vec code = size_of(load(state.codes + i));
      for (;;) {
        const Vec half = code + way * 0.5f;
        // Compared as products: the code after the change, at the last scale.
        const IVec some = grows ? (size < half * last_scale) & (code > limit)
                                : (size > half * last_scale) & (code < limit);
        const uint32_t lanes = bits_of_lanes(some);
        if (!lanes) break;
        const Vec steps = (size / half - first_scale) * per_scale;
        const Vec within = smaller(larger(steps, Vec{}), splat(float(count - 1 - next)));
        const IVec candidate = next + __builtin_convertvector(within, IVec);
        if (found.size() < number + LANES) found.resize(2 * number + LANES);
        store_lanes(found.data() + number, (candidate + 1) << BEHIND_COLUMN | columns, lanes);
        number += size_t(__builtin_popcount(lanes));
        code += way;
      }
    }
    for (size_t i = 0; i < number; i++) ends[candidate_of(found[i])]++;
    const size_t most_of_all = number + size_t(count) * (LEAST_AT_ONCE - 1);
    if (changes.size() < most_of_all) changes.resize(most_of_all);
    int64_t all = 0;
    for (int64_t k = 0; k < count; k++) {
      starts[k] = all;
      all += (ends[k] + LEAST_AT_ONCE - 1) / LEAST_AT_ONCE * LEAST_AT_ONCE;
      if (ends[k]) changes[size_t(all) - 1] = NOTHING;
      ends[k] = starts[k];
    }
    for (size_t i = 0; i < number; i++) changes[ends[candidate_of(found[i])]++] = found[i];
  }

  // Make a candidate's changes, some at once: what codes are multiplied by is brought up to date in
  // one go.
  void make_changes(const PartOfRow& row, int64_t k, Coupled& state) {
    int64_t i = starts[k];
    for (; i + LEAST_AT_ONCE < ends[k]; i += AT_ONCE)
      make_some<AT_ONCE>(row, changes.data() + i, state);
    if (i < ends[k]) make_some<LEAST_AT_ONCE>(row, changes.data() + i, state);
  }

  template <int NUMBER>
  static void make_some(const PartOfRow& row, const int32_t* change, Coupled& state) {
    float steps[NUMBER], quadratic = 0, linear = 0, slope = 0;
    const float *columns[NUMBER], *factors[NUMBER];
#pragma GCC unroll 4
    for (int j = 0; j < NUMBER; j++) {
      const int64_t at = change[j] & MOST_COLUMN;
      steps[j] = step_of(change[j]);
      columns[j] = row.matrix + at * row.width;
      factors[j] = row.factors + at * row.rank;
      float product = 2 * state.products[at] + steps[j] * columns[j][at];
#pragma GCC unroll 4
      for (int other = 0; other < j; other++) product += 2 * steps[other] * columns[other][at];
      quadratic += steps[j] * product;
      linear += steps[j] * row.products[at];
      slope += steps[j] * row.slopes[at];
    }
    add_all<NUMBER>(state.products, steps, columns, row.width);
    add_all<NUMBER>(state.share, steps, factors, row.rank);
    state.quadratic += quadratic;
    state.linear += linear;
    state.slope += slope;
  }

  template <int NUMBER>
  static void add_all(float* target, const float* steps, const float* const* sources,
                      int64_t count) {
    for (int64_t i = 0; i < count; i += PANEL)
#pragma GCC unroll 2
      for (int64_t at = i; at < i + PANEL; at += LANES) {
        Vec sum = load(target + at);
#pragma GCC unroll 4
        for (int j = 0; j < NUMBER; j++) sum += load(sources[j] + at) * steps[j];
        store(target + at, sum);
      }
  }

  // The best candidate of each row.
  void choose(int64_t group) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t here = of_group(r, group);
      double best = std::numeric_limits<double>::infinity();
      best_scales[r] = task.scales[here];
      best_zeros[r] = zero_of(task.zeros, r, group);
      for (int64_t k = 0; k < task.count; k++) {
        const double* sum = sums.data() + (r * task.count + k) * 3;
        const double scale = task.candidates[here * task.count + k];
        const double error = constant[r] + scale * (scale * sum[0] - 2 * sum[1]);
        const double with_others = error + 2 * scale * sum[2];
        if (!(error <= task.limits[here]) || !(with_others < best)) continue;
        best = with_others;
        best_scales[r] = float(scale);
        if (task.zeros) best_zeros[r] = task.candidate_zeros[here * task.count + k];
      }
    }
  }
};

template <bool INTEGER>
static void refine_tiles(const SweepTask& task, int64_t parts) {
  const int64_t tiles = (task.rows + TILE_ROWS - 1) / TILE_ROWS;
  in_parallel(tiles, parts, [&](int64_t, int64_t first, int64_t last) {
    Tile<INTEGER> tile(task);
    auto for_all = [&](auto work) {
      for (int64_t group = 0; group < task.groups; group++)
        for (int64_t row = first * TILE_ROWS; row < last * TILE_ROWS; row += TILE_ROWS)
          work(group, row, std::min(TILE_ROWS, task.rows - row));
    };
    for_all([&](int64_t group, int64_t row, int64_t number) { tile.begin(group, row, number); });
    for_all([&](int64_t group, int64_t row, int64_t number) { tile.sweep(group, row, number); });
  });
}

// Give each group of rows the best of its candidates, or leave it as it is.
extern "C" void refine_rows(const SweepTask* task, int64_t parts) {
  task->format.integer ? refine_tiles<true>(*task, parts) : refine_tiles<false>(*task, parts);
}
