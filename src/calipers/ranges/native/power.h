// |error|**norm, by the bits of floats and polynomials.
#pragma once

#include "simd.h"

enum Power { SQUARE, ABOVE_TWO, BELOW_TWO, STEEP };

// The logarithm of a number >= 0, right to 3e-7; of zero -127, where any number does here.
static inline Vec log2_of(Vec x) {
  IVec bits = bits_of(x);
  // Below the bits of 2**23 an integer's bits are its value.
  Vec exponent = from_bits((bits >> 23) | 0x4b000000) - 8388735.0f;
  Vec m = from_bits((bits & 0x7fffff) | 0x3f800000) - 1.0f;
  Vec curve = splat(0.01552991196513176f);
  curve = curve * m - 0.07955770939588547f;
  curve = curve * m + 0.1942943036556244f;
  curve = curve * m - 0.32590195536613464f;
  curve = curve * m + 0.4735534191131592f;
  curve = curve * m - 0.7205854654312134f;
  curve = curve * m + 1.442667841911316f;
  return curve * m + exponent;
}

// A power of two, for exponents of -126 to 127, right to 1e-7 of itself.
static inline Vec exp2_of(Vec x) {
  Vec far = x + FAR;
  Vec f = x - (far - FAR);  // -.5 to .5
  Vec curve = splat(0.0013276472454890609f);
  curve = curve * f + 0.009675540961325169f;
  curve = curve * f + 0.05550713092088699f;
  curve = curve * f + 0.24022120237350464f;
  curve = curve * f + 0.6931469440460205f;
  curve = curve * f + 1.0000001192092896f;
  return from_bits(bits_of(curve) + (bits_of(far) << 23));
}

template <Power POWER>
static inline Vec power_of(Vec error, float norm) {
  if (POWER == SQUARE) return error * error;
  // Squares of tiny errors vanish, which lower powers of them do not. The smaller the exponent of
  // what is left, the less of the logarithm's error comes through.
  Vec base = POWER == BELOW_TWO ? size_of(error) : error * error;
  Vec exponent = log2_of(base) * (POWER == BELOW_TWO ? norm - 1 : norm / 2 - 1);
  if (POWER == STEEP) exponent = smaller(larger(exponent, splat(-126)), splat(127));
  return base * exp2_of(exponent);
}
