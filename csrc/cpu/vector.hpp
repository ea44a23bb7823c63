// Vectors of floats in the width of one instruction set, and the few functions the kernels need on them. Included by
// `body.hpp`, once for each instruction set; RMT_LANES is the width.
//
// NaN goes through every function here: a memory state that is no longer finite must be seen.

typedef float Vec __attribute__((vector_size(4 * RMT_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * RMT_LANES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(4 * RMT_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * RMT_LANES)));

constexpr int64_t kLanes = RMT_LANES;

inline Vec load_vec(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store_vec(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }
inline Bits bits_of(Vec value) { return (Bits)value; }
inline Vec from_bits(Bits bits) { return (Vec)bits; }

inline Vec larger(Vec a, Vec b) { return a < b ? b : a; }

inline float sum(Vec value) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

// eˣ within 2 units in the last place; 0 and infinity are not reached: x is held to where 2ⁿ is a normal number.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: the sum's low bits are x / ln 2, rounded
  const Vec n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((bits_of(shifted) << 23) + 0x3f800000u);
}

inline Vec silu(Vec x) { return x / (exponential(-x) + 1.0f); }

// x · Φ(x); erfc by Abramowitz and Stegun 7.1.26, within 2e-7.
inline Vec gelu(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec below = x * 0.5f * (p * t * exponential(-z * z));
  return x < 0.0f ? below : x - below;
}

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
inline Vec gelu_tanh(Vec x) {
  const Vec u = (x * x * x * 0.044715f + x) * 0.79788456f;
  return x / (exponential(u * -2.0f) + 1.0f);
}

// Near 0 the odd series: 1 - 2 / (e²ˣ + 1) would lose its last digits there.
inline Vec tangent(Vec x) {
  const Vec far = 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f);
  const Vec s = x * x;
  Vec p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Vec near = p * s * x + x;
  return s < 0.390625f ? near : far;
}

// ---------------------------------------------------------------------------------------------- half precision

inline float widen(float value) { return value; }

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(Bfloat16 value) { return as_float(uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t{value.bits & 0x8000u} << 16;
  // Exponents differ by 112; the product is exact, for subnormals too.
  const float finite = as_float(magnitude << 13) * as_float((127u + 112u) << 23);
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : as_bits(finite);
  return as_float(bits | sign);
}

inline void narrow(float value, float* to) { *to = value; }

inline void narrow(float value, Bfloat16* to) {  // to the nearest, ties to even
  const uint32_t bits = as_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float value, Float16* to) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition of ½ rounds at the right bit
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}
