// Number formats: how values round to codes, and how compressed-tensors makes scales of ranges.
#pragma once

#include "box.h"

enum ScaleType : int64_t { ANY_SCALE, FLOAT8_SCALE, POWER_OF_TWO_SCALE };

struct Format {
  int64_t integer;
  int64_t symmetric;
  int64_t scale_type;
  int64_t global;  // whether scales are stored multiplied by global_scale
  int64_t mx_offset;
  float lowest;  // code
  float highest;
  float half_range;
  float global_scale;
  float scale_limit;  // largest scale as stored, where that is bounded
  float scale_eps;    // what stands for a scale of zero
  float shift;        // float formats: 1.5 * 2**23 steps of the numbers from 1 to 2
  int64_t smallest;   // float formats: bits of the smallest normal number
  int64_t range_type;  // of box.h: what ranges and their scales are rounded to, if symmetric
};

// To the nearest number of a small float format, ties to even. The bits of the exponent alone are
// the power of two below the size; below the smallest normal number the step stays what it is there.
static inline Vec float_code(Vec size, float shift, int32_t smallest) {
  IVec exponent = larger(bits_of(size) & 0x7f800000, IVec{} + smallest);
  Vec far = from_bits(exponent) * shift;
  return (size + far) - far;
}

struct Candidate {
  Vec scale, inverse, far;  // far: the zero point, far from zero
};

// Codes of values relative to the zero point; of sizes for float formats.
template <bool INTEGER>
static inline Vec code_of(const Format& format, Vec value, const Candidate& c) {
  if (INTEGER) {
    // What is too large to be rounded by an addition is clamped anyway.
    Vec code = larger(value * c.inverse + c.far, splat(format.lowest + FAR));
    return smaller(code, splat(format.highest + FAR)) - c.far;
  }
  Vec size = smaller(size_of(value) * c.inverse, splat(format.highest));
  return float_code(size, format.shift, int32_t(format.smallest));
}

// A value less its fake-quantized self; for float formats the sizes of both. A NaN among the codes
// may be lost in the clamping: the value or the scale that it came from is a factor here.
template <bool INTEGER>
static inline Vec error_of(const Format& format, Vec value, const Candidate& c) {
  Vec code = code_of<INTEGER>(format, value, c);
  return (INTEGER ? value : size_of(value)) - code * c.scale;
}

// Products in a function of their own: fused with what they are added to they would be rounded
// differently from compressed-tensors'.
__attribute__((noinline)) static void shrink_range(const Vec* range, float factor, Vec* shrunk) {
  shrunk[0] = range[0] * factor;
  shrunk[1] = range[1] * factor;
}

// Numbers >= 0 as a sixteen-bit dtype holds them, to the nearest, ties to even, and to its largest.
static inline Vec in_range_type(const Format& format, Vec size) {
  if (format.range_type == FLOAT16)
    return float_code(smaller(splat(65504.0f), size), 12288.0f, 113 << 23);
  if (format.range_type == BFLOAT16) {
    const Vec most = from_bits(IVec{} + 0x7f7f0000);
    IVec bits = bits_of(size > most ? most : size);
    return from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & int32_t(0xffff0000));
  }
  return size;
}

// compressed_tensors.quantization.utils.calculate_qparams, bit by bit: the scale as it is stored.
static inline Vec stored_scale(const Format& format, Vec low, Vec high, Vec& zero) {
  Vec none{}, scale;
  low = low > none ? none : low;
  high = high < none ? none : high;
  zero = none;
  if (format.symmetric) {
    Vec size = -low > high ? -low : high;
    size = in_range_type(format, (low != low) ? low : size);
    if (format.scale_type == POWER_OF_TWO_SCALE) {
      IVec exponent = ((bits_of(size) + (1 << 21)) >> 23) & 255;
      IVec code = larger(exponent - int32_t(format.mx_offset), IVec{});
      code = (bits_of(size) & 0x7f800000) == 0x7f800000 ? IVec{} + 255 : code;
      // Code 0 is 2**-127, half of the smallest normal number.
      scale = from_bits(code == 0 ? IVec{} + (1 << 22) : code << 23);
    } else {
      scale = in_range_type(format, size / format.half_range);
    }
  } else {
    scale = (high - low) / (2 * format.half_range);
    // A range of nothing has no zero point; any will do.
    zero = format.lowest - low / select(scale == none, splat(1), scale);
    zero = nearest(smaller(larger(zero, splat(format.lowest)), splat(format.highest)));
  }
  if (format.global) scale = format.global_scale * scale;
  if (format.scale_type == FLOAT8_SCALE) {
    scale = scale > format.scale_limit ? splat(format.scale_limit) : scale;
    scale = float_code(scale, 1572864.0f, 121 << 23);
  }
  return select(scale == none, splat(format.scale_eps), scale);
}

static inline Candidate candidate_of(Vec scale, Vec zero) { return {scale, 1 / scale, zero + FAR}; }

// The same, the global scale divided out.
static inline Candidate candidate_of_stored(const Format& format, Vec scale, Vec zero) {
  return candidate_of(format.global ? scale / format.global_scale : scale, zero);
}
