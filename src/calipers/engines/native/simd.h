// Vectors in the common dialect of GCC and Clang: both map them to whatever registers the target
// has. Wider ones than those would be spilled.
#pragma once

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

static inline Vec splat(float x) { return Vec{} + x; }
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
