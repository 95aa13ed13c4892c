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

// log2(m) + 1 - m for 1 <= m < 2 to 1.3e-5, and 2**x for |x| <= 1/2 to 2.6e-6 of itself: by Remez.
constexpr float LOG2[] = {0.0448736102f, -0.416563687f, 1.63114876f,
                          -3.55079292f,  4.09171081f,   -1.80036403f};
constexpr float EXP2[] = {0.00957010191f, 0.0559178603f, 0.240247448f, 0.693121815f, 0.999999261f};

// Logarithms of numbers >= 0, right to 1.4e-5, in place; of zero -127, where any number does here.
template <int COUNT>
static inline void log2_of(Vec* x) {
  Vec mantissa[COUNT], curve[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) {
    mantissa[i] = from_bits((bits_of(x[i]) & 0x7fffff) | 0x3f800000);
    // Bits read as an integer are the exponent and, as its fraction, the mantissa less one.
    x[i] = __builtin_convertvector(bits_of(x[i]) - 0x3f800000, Vec);
  }
  polynomial<COUNT, 5>(LOG2, mantissa, curve);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) x[i] = x[i] * 0x1p-23f + curve[i];
}

// Powers of two, for exponents of -126 to 127, right to 2.6e-6 of themselves, in place.
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
  polynomial<COUNT, 4>(EXP2, x, curve);
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
