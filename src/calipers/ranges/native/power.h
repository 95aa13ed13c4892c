// |error|**norm, by the bits of floats and polynomials.
#pragma once

#include "simd.h"

enum Power { SQUARE, CUBE, ABOVE_TWO, BELOW_TWO, STEEP };

// A polynomial of some numbers, the highest coefficient first.
template <int COUNT, int DEGREE>
static inline void polynomial(const float (&coefficients)[DEGREE + 1], const Vec* x, Vec* found) {
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) found[i] = splat(coefficients[0]);
#pragma GCC unroll 8
  for (int k = 1; k <= DEGREE; k++)
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) found[i] = found[i] * x[i] + coefficients[k];
}

constexpr float LOG2[] = {0.01552991196513176f, -0.07955770939588547f, 0.1942943036556244f,
                          -0.32590195536613464f, 0.4735534191131592f,  -0.7205854654312134f,
                          1.442667841911316f};
constexpr float EXP2[] = {0.0013276472454890609f, 0.009675540961325169f, 0.05550713092088699f,
                          0.24022120237350464f,   0.6931469440460205f,   1.0000001192092896f};

// Logarithms of numbers >= 0, right to 3e-7, in place; of zero -127, where any number does here.
template <int COUNT>
static inline void log2_of(Vec* x) {
  Vec m[COUNT], curve[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) {
    m[i] = from_bits((bits_of(x[i]) & 0x7fffff) | 0x3f800000) - 1.0f;
    // Below the bits of 2**23 an integer's bits are its value.
    x[i] = from_bits((bits_of(x[i]) >> 23) | 0x4b000000) - 8388735.0f;
  }
  polynomial<COUNT, 6>(LOG2, m, curve);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) x[i] += curve[i] * m[i];
}

// Powers of two, for exponents of -126 to 127, right to 1e-7 of themselves, in place.
template <int COUNT>
static inline void exp2_of(Vec* x) {
  IVec whole[COUNT];
  Vec curve[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) {
    Vec far = x[i] + FAR;
    whole[i] = bits_of(far) << 23;
    x[i] -= far - FAR;  // -.5 to .5
  }
  polynomial<COUNT, 5>(EXP2, x, curve);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) x[i] = from_bits(bits_of(curve[i]) + whole[i]);
}

static inline Vec log2_of(Vec x) {
  log2_of<1>(&x);
  return x;
}
static inline Vec exp2_of(Vec x) {
  exp2_of<1>(&x);
  return x;
}

// |error|**norm of some errors side by side, in place. One operation is done for all of them before
// the next: each waits for the one before, and processors look but so far ahead.
template <Power POWER, int COUNT>
static inline void raise_to_power(Vec* errors, float norm) {
  if (POWER == SQUARE || POWER == CUBE) {
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++)
      errors[i] = errors[i] * errors[i] * (POWER == CUBE ? size_of(errors[i]) : splat(1));
    return;
  }
  // Squares of tiny errors vanish, which lower powers of them do not. The smaller the exponent of
  // what is left, the less of the logarithm's error comes through.
  const float rest = POWER == BELOW_TWO ? norm - 1 : norm / 2 - 1;
  Vec powers[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++)
    powers[i] = errors[i] = POWER == BELOW_TWO ? size_of(errors[i]) : errors[i] * errors[i];
  log2_of<COUNT>(powers);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) {
    powers[i] *= rest;
    if (POWER == STEEP) powers[i] = smaller(larger(powers[i], splat(-126)), splat(127));
  }
  exp2_of<COUNT>(powers);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) errors[i] *= powers[i];
}
