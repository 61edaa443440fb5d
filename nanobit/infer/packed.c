/* Ternary matrices packed to two bits times one token, or a few: the inner loop of packed.py.

   Every step here has one correct rounding in IEEE arithmetic, and the order is that of quant.py and model.py, so
   the results are theirs to the last bit. What torch sums in its own order (means, attention, logits) is left to
   torch. Compile without contraction into fused multiply-adds. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>

/* step adds the products of 32 bytes u >= 0 and 32 bytes v to the sums s. VNNI does so in 32 bits. AVX2 does so in 16,
   which must stay within 2^15; widen then adds its sums in pairs, in 32 bits. */
#if defined __AVX512VNNI__ && defined __AVX512VL__
#define DPBUSD _mm256_dpbusd_epi32
#elif defined __AVXVNNI__
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif
#ifdef DPBUSD
static inline __m256i step(__m256i s, __m256i u, __m256i v) { return DPBUSD(s, u, v); }
static inline __m256i widen(__m256i s) { return s; }
#else
static inline __m256i step(__m256i s, __m256i u, __m256i v) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(u, v)); }
static inline __m256i widen(__m256i s) { return _mm256_madd_epi16(s, _mm256_set1_epi16(1)); }
#endif

static inline __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* load 32 weights, which are read once a token, so from memory; what follows 2 KB later is fetched meanwhile */
static inline __m256i stream(const void *at) {
  __builtin_prefetch((const char *)at + 2048);
  return load(at);
}

/* total[k] += the sum of s[k], numbers of 32 bits */
static inline void add_sums(const __m256i s[4], int32_t total[4]) {
  const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128((__m128i *)total, _mm_add_epi32(_mm_loadu_si128((__m128i *)total), four));
}
#endif

typedef struct {
  const uint8_t *codes; /* (n_out / 4, n_in): byte row r holds t + 1 of rows r, r + R, r + 2R, r + 3R, R = n_out / 4 */
  int64_t n_out;
  float scale;
} matrix;

/* sum[k] = the product of q with the k-th codes + 1 of n bytes */
static void products(const uint8_t *codes, const int8_t *q, int64_t n, int32_t sum[4]) {
  int64_t i = 0;
  for (int k = 0; k < 4; k++) sum[k] = 0;
#ifdef __AVX2__
  const __m256i three = _mm256_set1_epi8(3);
  while (i + 32 <= n) {
    __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    const int64_t end = n - i > 1024 ? i + 1024 : n; /* 32 steps: 32 * 2 * 3 * 127 < 2^15 */
    for (; i + 32 <= end; i += 32) {
      const __m256i four = stream(codes + i);
      const __m256i u[4] = {four, _mm256_srli_epi16(four, 2), _mm256_srli_epi16(four, 4), _mm256_srli_epi16(four, 6)};
      for (int k = 0; k < 4; k++) s[k] = step(s[k], _mm256_and_si256(u[k], three), load(q + i));
    }
    for (int k = 0; k < 4; k++) s[k] = widen(s[k]);
    add_sums(s, sum);
  }
#endif
  for (; i < n; i++) {
    const int16_t four = codes[i], v = q[i];
    sum[0] += (int16_t)(four & 3) * v;
    sum[1] += (int16_t)(four >> 2 & 3) * v;
    sum[2] += (int16_t)(four >> 4 & 3) * v;
    sum[3] += (int16_t)(four >> 6) * v;
  }
}

/* q = round(x a) with a = 127 / max|x|; returns sum(q) */
static int32_t quantize(const float *x, int64_t n, int8_t *q, float *a) {
  int32_t most = 0, total = 0; /* without their sign, the bits of floats are in the order of the floats */
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float max;
  memcpy(&max, &most, 4);
  *a = max < INFINITY ? 1.0f / fmaxf(max, 1e-5f) * 127.0f : NAN; /* as torch computes 127.0 / max */
  for (int64_t i = 0; i < n; i++) {
    q[i] = max < INFINITY ? (int8_t)rintf(x[i] * *a) : 0; /* a makes y NaN */
    total += q[i];
  }
  return total;
}

/* y (n_rows, sum of n_out) = x (n_rows, n_in) through n_matrices BitLinears, side by side. What may be NULL: x is
   first normalized (mean of its squares, weight norm, eps), then multiplied by factor; residual is added to y. */
void packed_linear(const matrix *matrices, int64_t n_matrices, int64_t n_rows, int64_t n_in, const float *x,
                   const float *mean, const float *norm, float eps, const float *factor, const float *residual,
                   float *y) {
  int8_t *q = malloc(n_rows * n_in * sizeof *q);
  float *z = malloc(n_in * sizeof *z), *a = malloc(n_rows * sizeof *a);
  int32_t *total = malloc(n_rows * sizeof *total);
  for (int64_t n = 0; n < n_rows; n++) {
    const float r = norm ? 1.0f / sqrtf(mean[n] + eps) : 1.0f;
    for (int64_t i = 0; i < n_in; i++) z[i] = norm ? x[n * n_in + i] * r * norm[i] : x[n * n_in + i];
    for (int64_t i = 0; factor && i < n_in; i++) z[i] *= factor[n * n_in + i];
    total[n] = quantize(z, n_in, q + n * n_in, a + n);
  }
  int64_t n_bytes = 0;
  for (int64_t m = 0; m < n_matrices; m++) n_bytes += matrices[m].n_out / 4;
#pragma omp parallel for schedule(static) if (n_bytes * n_in > 16384)
  for (int64_t byte = 0; byte < n_bytes; byte++) {
    const matrix *m = matrices;
    int64_t r = byte, first = 0;
    for (; r >= m->n_out / 4; m++) r -= m->n_out / 4, first += m->n_out;
    const int64_t R = m->n_out / 4;
    const uint8_t *codes = m->codes + r * n_in;
    for (int64_t n = 0; n < n_rows; n++) {
      int32_t sum[4];
      products(codes, q + n * n_in, n_in, sum);
      for (int k = 0; k < 4; k++) {
        const int64_t at = n * 4 * n_bytes + first + k * R + r;
        const float product = (float)(sum[k] - total[n]) / (m->scale * a[n]);
        y[at] = residual ? residual[at] + product : product;
      }
    }
  }
  free(q), free(z), free(a), free(total);
}

/* the product of w and q, n numbers from -127 to 127 */
static int32_t dot(const int8_t *w, const int8_t *q, int64_t n) {
  int32_t sum[4] = {0};
  int64_t i = 0;
#ifdef __AVX2__
  const __m256i zero = _mm256_setzero_si256();
  __m256i s[4] = {zero, zero, zero, zero};
  for (; i + 32 <= n; i += 32) { /* step takes |q|, and w with the sign of q: 2 * 127 * 127 < 2^15 */
    const __m256i v = load(q + i);
    s[0] = _mm256_add_epi32(s[0], widen(step(zero, _mm256_abs_epi8(v), _mm256_sign_epi8(stream(w + i), v))));
  }
  add_sums(s, sum);
#endif
  for (; i < n; i++) sum[0] += (int16_t)w[i] * q[i];
  return sum[0];
}

/* y (n_rows, n_out) = x (n_rows, n_in) times int8 rows w (n_out, n_in), each divided by its scale */
void int8_linear(const int8_t *w, const float *scales, int64_t n_out, int64_t n_rows, int64_t n_in, const float *x,
                 float *y) {
  int8_t *q = malloc(n_rows * n_in * sizeof *q);
  float *a = malloc(n_rows * sizeof *a);
  for (int64_t n = 0; n < n_rows; n++) quantize(x + n * n_in, n_in, q + n * n_in, a + n);
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < n_out; first += 8) /* of w, for the cache if x has many rows */
    for (int64_t n = 0; n < n_rows; n++)
      for (int64_t r = first; r < n_out && r < first + 8; r++)
        y[n * n_out + r] = (float)dot(w + r * n_in, q + n * n_in, n_in) / (scales[r] * a[n]);
  free(q), free(a);
}

/* rotary positions for x (n_head, size), in place, with cos, sin (size) */
void rotate(float *x, int64_t n_head, int64_t size, const float *cos, const float *sin) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < n_head; h++, x += size)
    for (int64_t i = 0; i < half; i++) {
      const float first = x[i], second = x[i + half];
      x[i] = first * cos[i] + -second * sin[i];
      x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}
