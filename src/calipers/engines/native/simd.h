// Vectors in the common dialect of GCC and Clang: both map them to whatever registers the target
// has. Wider ones than those would be spilled.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * LANES)));

// Less zero and not plus zero, which would be an addition: -0 + 0 is 0.
static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec load(const float* source) {
  Vec found;
  std::memcpy(&found, source, sizeof found);
  return found;
}
static inline void store(float* target, Vec x) { std::memcpy(target, &x, sizeof x); }

static inline Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }
// Of a NaN among the two the second is taken, as the instructions do it.
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline IVec larger(IVec a, IVec b) { return a > b ? a : b; }

// Bits as they are.
static inline IVec bits_of(Vec x) { return (IVec)x; }
static inline Vec from_bits(IVec x) { return (Vec)x; }
static inline Vec size_of(Vec x) { return from_bits(bits_of(x) & 0x7fffffff); }

static inline uint32_t bits_of_one(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

static inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename Half, typename Whole>
static inline void split(const Whole& whole, Half& first, Half& second) {
  std::memcpy(&first, &whole, sizeof first);
  std::memcpy(&second, reinterpret_cast<const char*>(&whole) + sizeof first, sizeof second);
}

// One bit for each lane whose mask is set.
static inline uint32_t bits_of_lanes(IVec mask) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; lane++) bits |= uint32_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

// The lanes whose bit is set, one after the other; what lies behind them in the vector is lost.
static inline void store_lanes(int32_t* target, IVec x, uint32_t lanes) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(__mmask16(lanes), (__m512i)x));
#elif defined(__AVX2__)
  // For each set of lanes their numbers, a byte each.
  static const auto numbers = [] {
    std::array<uint64_t, 256> found{};
    for (uint32_t set = 0; set < 256; set++)
      for (uint32_t lane = 0, at = 0; lane < 8; lane++)
        if (set >> lane & 1) found[set] |= uint64_t(lane) << (8 * at++);
    return found;
  }();
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(numbers[lanes])));
  _mm256_storeu_si256((__m256i*)target, _mm256_permutevar8x32_epi32((__m256i)x, order));
#else
  for (int lane = 0; lane < LANES; lane++)
    if (lanes >> lane & 1) *target++ = x[lane];
#endif
}

// 0, 1, 2 and so on.
static inline IVec lane_numbers() {
  IVec numbers{};
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
  return numbers;
}

static inline bool any(IVec mask) {
  int64_t halves[LANES / 2], found = 0;
  std::memcpy(halves, &mask, sizeof mask);
  for (int64_t half : halves) found |= half;
  return found != 0;
}
static inline bool all(IVec mask) { return !any(~mask); }

// Far from zero floats lie one apart: adding this number, and taking it away, rounds to the nearest
// integer, ties to even, for |x| < 2**22.
constexpr float FAR = 12582912.0f;
static inline Vec nearest(Vec x) { return (x + FAR) - FAR; }
