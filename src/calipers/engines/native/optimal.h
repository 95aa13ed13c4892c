// Scales with the smallest squared error, weighted or not: see projection.py and codes.py.
#pragma once

#include "sums.h"

// -- scales that may be any number: candidates, and projection onto their codes ------------------

struct ProjectionTask {
  Box box;
  Format format;
  const float* inverse_base;  // of each group
  const float* zeros;         // zero point of the whole range of each group; null: none
  const float* ratios;        // candidates in units of the base
  const float* offsets;       // of the zero points of these from that of the range
  int64_t count;
  const float* factors;  // candidates about the best one, as factors
  int64_t fine_count;
  int64_t rounds;    // of these
  int64_t residual;  // whether xq^2 / qq cancels, so that errors are summed themselves
  float* best_ratio;  // of each group
  float* best_zero;
};

struct Winner {
  Vec gain, ratio, zero;
};

// Sums and candidates of more would not fit into sixteen registers.
constexpr int TILE_OF_PRODUCTS = LANES == 16 ? 4 : 2;

// Take some candidates in: their sums, and the best of them by lane.
template <bool INTEGER, bool WEIGHTED, bool RESIDUAL>
static void score(const Format& format, const Block& block, const Candidate* tile, int count,
                  Winner& best) {
  Products total[TILE_OF_PRODUCTS] = {};
  sum_products<INTEGER, WEIGHTED, RESIDUAL, TILE_OF_PRODUCTS>(
      format, block, tile, [&](int t, const Products& part) {
        total[t].xq += part.xq;
        total[t].qq += part.qq;
        total[t].residual += part.residual;
      });
  for (int t = 0; t < count; t++) {
    Vec ratio = total[t].xq / total[t].qq;
    Vec gap = total[t].xq - tile[t].scale * total[t].qq;
    Vec gain = RESIDUAL ? gap * gap / total[t].qq - total[t].residual : total[t].xq * ratio;
    IVec better = (total[t].qq > Vec{}) & (gain > best.gain);
    best.gain = select(better, gain, best.gain);
    best.ratio = select(better, ratio, best.ratio);
    best.zero = select(better, tile[t].far - FAR, best.zero);
  }
}

using Score = void (*)(const Format&, const Block&, const Candidate*, int, Winner&);

// Candidates that wait for their tile to be full.
struct Waiting {
  const ProjectionTask& task;
  const Block& block;
  Score score;
  Winner& best;
  Candidate tile[TILE_OF_PRODUCTS] = {};
  int held = 0;

  void add(Vec ratio, Vec zero) {
    zero = smaller(larger(zero, splat(task.format.lowest)), splat(task.format.highest));
    tile[held++] = candidate_of(ratio, zero);
    if (held == TILE_OF_PRODUCTS) flush();
  }
  void flush() {
    if (!held) return;
    for (int t = held; t < TILE_OF_PRODUCTS; t++) tile[t] = tile[0];
    score(task.format, block, tile, held, best);
    held = 0;
  }
};

static void project_block(const ProjectionTask& task, int64_t index, Block& block, Score score) {
  const Box& box = task.box;
  int64_t first = index * LANES, count = std::min<int64_t>(LANES, box.units() - first);
  load_scaled(box, task.format, index, by_group(box, task.inverse_base, index), block);
  Vec whole_zero = task.zeros ? by_group(box, task.zeros, index) : Vec{};
  Winner best{splat(-std::numeric_limits<float>::infinity()), splat(1), whole_zero};
  Waiting waiting{task, block, score, best};
  for (int64_t k = 0; k < task.count; k++)
    waiting.add(splat(task.ratios[k]), whole_zero + task.offsets[k]);
  waiting.flush();
  int beside = task.zeros ? 1 : 0;
  for (int64_t round = 0; round < task.rounds; round++) {
    Winner centre = best;
    for (int side = -beside; side <= beside; side++)
      for (int64_t k = 0; k < task.fine_count; k++)
        waiting.add(centre.ratio * task.factors[k], centre.zero + float(side));
    waiting.flush();
  }
  std::memcpy(task.best_ratio + first, &best.ratio, count * sizeof(float));
  if (task.zeros) std::memcpy(task.best_zero + first, &best.zero, count * sizeof(float));
}

template <bool INTEGER>
static Score choose_score(bool weighted, bool residual) {
  if (residual || !INTEGER)
    return weighted ? score<INTEGER, true, true> : score<INTEGER, false, true>;
  return weighted ? score<INTEGER, true, false> : score<INTEGER, false, false>;
}

extern "C" void project(const ProjectionTask* task, int64_t parts) {
  bool weighted = task->box.weights != nullptr;
  Score score = task->format.integer ? choose_score<true>(weighted, task->residual)
                                     : choose_score<false>(weighted, true);
  for_blocks(task->box, parts,
             [&](int64_t index, Block& block) { project_block(*task, index, block, score); });
}

// -- scales of which there are few: all of them, within two bounds -------------------------------

struct CodeTask {
  Box box;
  Format format;
  const float* scales;  // ascending
  int64_t count;
  const int64_t* covering;  // index of the smallest scale that covers each group
  int64_t above;            // scales above it that are tried
  int64_t start;            // index of the first one tried, at least
  int64_t* best;            // index, of each group
};

template <bool WEIGHTED>
static void search_codes_block(const CodeTask& task, int64_t index, Block& block) {
  const Box& box = task.box;
  int64_t first = index * LANES, count = std::min<int64_t>(LANES, box.units() - first);
  int64_t code[LANES], best_code[LANES];
  float covering[LANES], scale[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    int64_t group = std::min(first + lane, box.units() - 1);
    best_code[lane] = task.covering[group];
    code[lane] = std::max(task.covering[group] + task.above, task.start);
    covering[lane] = std::max(task.scales[task.covering[group]], 1.17549435e-38f);
  }
  Vec inverse = 1 / load(covering);
  load_scaled(box, task.format, index, inverse, block);
  Vec best = splat(std::numeric_limits<float>::infinity());
  for (bool going = true; going;) {
    // A scale that there is not, at either end, stands for its neighbour, which does not win twice.
    for (int lane = 0; lane < LANES; lane++)
      scale[lane] = task.scales[std::clamp<int64_t>(code[lane], 0, task.count - 1)];
    Candidate candidate = candidate_of(load(scale) * inverse, Vec{});
    Vec edge = candidate.scale * task.format.highest, error{}, clipped{};
    for (int64_t i = 0; i < block.length; i++) {
      Vec x = load(block.values + i * LANES);
      Vec w = WEIGHTED ? load(block.weights + i * LANES) : Vec{};
      Vec rest = x - code_of<false>(task.format, x, candidate) * candidate.scale;
      Vec over = larger(x - edge, Vec{});
      error += WEIGHTED ? w * rest * rest : rest * rest;
      clipped += WEIGHTED ? w * over * over : over * over;
    }
    IVec better = error < best;
    best = select(better, error, best);
    going = false;
    for (int lane = 0; lane < LANES; lane++) {
      if (better[lane]) best_code[lane] = std::clamp<int64_t>(code[lane], 0, task.count - 1);
      // No smaller scale wins once clipping alone costs as much as the best.
      going = going || (code[lane] > 0 && clipped[lane] < best[lane]);
      code[lane]--;
    }
  }
  std::memcpy(task.best + first, best_code, count * sizeof(int64_t));
}

extern "C" void search_codes(const CodeTask* task, int64_t parts) {
  auto work = task->box.weights ? search_codes_block<true> : search_codes_block<false>;
  for_blocks(task->box, parts,
             [&](int64_t index, Block& block) { work(*task, index, block); });
}
