// SIMD vectors of FRACTAL_VEC_BYTES bytes on the compiler's vector extension, and loads and stores of the storage
// types. Included inside the ISA's namespace by each SIMD translation unit, so nothing here may be shared between them.

#define FRACTAL_UNROLL_ALL _Pragma("GCC unroll 16")
// Of a unit's loops: in one function with all the others they run out of registers.
#define FRACTAL_NOINLINE __attribute__((noinline))

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(FRACTAL_VEC_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = FRACTAL_VEC_BYTES / static_cast<int>(sizeof(A));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

typedef uint32_t U32 __attribute__((vector_size(FRACTAL_VEC_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(FRACTAL_VEC_BYTES / 2)));

template <class V, class T>
FRACTAL_HD V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

FRACTAL_HD Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
FRACTAL_HD Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
FRACTAL_HD void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
FRACTAL_HD void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }

FRACTAL_HD Vec<float> load(const bf16* p) {
#if FRACTAL_VEC_BYTES == 64  // GCC takes five instructions for the conversion where one does
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif FRACTAL_VEC_BYTES == 32
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  const U32 u = __builtin_convertvector(load_bits<U16>(p), U32) << 16;
  return load_bits<Vec<float>>(&u);
#endif
}

FRACTAL_HD void store(bf16* p, Vec<float> v) {  // round to nearest even; NaN stays NaN
  U32 u = load_bits<U32>(&v);
#if FRACTAL_VEC_BYTES == 32  // of 16 registers few are left for constants, and GCC's conversion takes two more
  const Vec<float> quiet = v + v;
  u = (v == v) ? u + 0x7fffu + (u << 15 >> 31) : load_bits<U32>(&quiet);
  const __m256i h = (__m256i)(u >> 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
#else
  const U32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  u = (v == v) ? rounded : (u | 0x400000u);
  const U16 h = __builtin_convertvector(u >> 16, U16);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

#if FRACTAL_VEC_BYTES == 64
FRACTAL_HD Vec<float> load(const f16* p) { return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FRACTAL_HD void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif FRACTAL_VEC_BYTES == 32
FRACTAL_HD Vec<float> load(const f16* p) { return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FRACTAL_HD void store(f16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  uint32_t u;
  if (exponent == 31)
    u = sign | 0x7f800000u | (fraction << 13);
  else if (exponent != 0)
    u = sign | ((exponent + 112) << 23) | (fraction << 13);
  else {
    const float subnormal = (float)fraction * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, sizeof u);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (u < 0x38800000u) {                        // below 2^-14: adding 0.5 aligns the subnormal's bits
    float magnitude;
    __builtin_memcpy(&magnitude, &u, sizeof u);
    magnitude += 0.5f;
    __builtin_memcpy(&u, &magnitude, sizeof u);
    return sign | (uint16_t)(u - 0x3f000000u);
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return sign | (uint16_t)(u >> 13);
}

FRACTAL_HD Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}
FRACTAL_HD void store(f16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
}
#endif

// Reads p into the second cache; where p may not be read, nothing happens.
template <class T>
FRACTAL_HD void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// n lanes of a row whose elements are Stride apart; the lanes past n are zero. The general case is kept out of line:
// inlined at every site it multiplies the code.
template <int Stride, class T>
__attribute__((noinline)) Vec<typename AccOf<T>::type> gather_lanes(const T* p, int n) {
  T lanes[kLanes<typename AccOf<T>::type>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i * Stride];
  return load(lanes);
}

template <int Stride, class T, class V>
__attribute__((noinline)) void scatter_lanes(T* p, V v, int n) {
  T lanes[kLanes<typename AccOf<T>::type>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i * Stride] = lanes[i];
}

#if FRACTAL_VEC_BYTES == 64
FRACTAL_HD Vec<float> load_first(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(_bzhi_u32(0xffff, n), p);
}
FRACTAL_HD Vec<double> load_first(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(_bzhi_u32(0xff, n), p);
}
FRACTAL_HD Vec<float> load_first(const bf16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(_bzhi_u32(0xffff, n), p);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
FRACTAL_HD Vec<float> load_first(const f16* p, int n) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(_bzhi_u32(0xffff, n), p));
}
FRACTAL_HD void store_first(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, _bzhi_u32(0xffff, n), (__m512)v);
}
FRACTAL_HD void store_first(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, _bzhi_u32(0xff, n), (__m512d)v);
}
template <class T>
FRACTAL_HD void store_first(T* p, Vec<float> v, int n) {
  T lanes[kLanes<float>];
  store(lanes, v);
  __m256i bits;
  __builtin_memcpy(&bits, lanes, sizeof bits);
  _mm256_mask_storeu_epi16(p, _bzhi_u32(0xffff, n), bits);
}
#else
template <class T>
FRACTAL_HD Vec<typename AccOf<T>::type> load_first(const T* p, int n) {
  return gather_lanes<1>(p, n);
}
template <class T, class V>
FRACTAL_HD void store_first(T* p, V v, int n) {
  scatter_lanes<1>(p, v, n);
}
#endif

template <int Stride, class T>
FRACTAL_HD Vec<typename AccOf<T>::type> load_lanes(const T* p, int n) {
  if (Stride != 1) return gather_lanes<Stride>(p, n);
  return n == kLanes<typename AccOf<T>::type> ? load(p) : load_first(p, n);
}

// A whole vector to memory past the caches; p is aligned to its bytes.
template <class T, class V>
FRACTAL_HD void store_past(T* p, V v) {
  T lanes[sizeof(V) / sizeof(v[0])];
  store(lanes, v);
#if FRACTAL_VEC_BYTES == 64
  if (sizeof lanes == 64) return _mm512_stream_si512((__m512i*)p, _mm512_loadu_si512(lanes));
#endif
#if FRACTAL_VEC_BYTES >= 32
  if (sizeof lanes == 32) return _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)lanes));
  _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)lanes));
#else
  __builtin_memcpy(p, lanes, sizeof lanes);
#endif
}

FRACTAL_HD void fence_stores() {  // what was stored past the caches is seen by whoever this thread signals next
#if FRACTAL_VEC_BYTES >= 32
  _mm_sfence();
#endif
}

template <int Stride, class T, class V>
FRACTAL_HD void store_lanes(T* p, V v, int n, bool past = false) {
  if (Stride != 1) return scatter_lanes<Stride>(p, v, n);
  if (n != kLanes<typename AccOf<T>::type>) return store_first(p, v, n);
  return past ? store_past(p, v) : store(p, v);
}

template <class A>
FRACTAL_HD Vec<A> splat(A a) {
  return Vec<A>{} + a;
}

template <class A>
FRACTAL_HD A horizontal_sum(Vec<A> v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// v with the lanes from n on set to zero.
template <class V>
FRACTAL_HD V first_lanes(V v, int n) {
  for (int i = n; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = 0;
  return v;
}
