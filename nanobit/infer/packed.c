/* Ternary matrices packed to two bits times the rows of one token or many: the inner loop of packed.py.

   Every step here has one correct rounding in IEEE arithmetic, and the order is that of quant.py and model.py, so
   the results are theirs to the last bit. What torch sums in its own order (means, attention) is left to torch; only
   float_linear adds in another. Compile without contraction into fused multiply-adds. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Vectors of BYTES bytes. step adds the products of bytes u >= 0 and bytes v to the sums s: VNNI in 32 bits, AVX2 in
   16, which must stay within 2^15; widen returns sums of 32 bits. Codes are unpacked once for TOKENS tokens, whose sums
   fill the registers. */
#if defined __AVX512VNNI__ && defined __AVX512BW__
#include <immintrin.h>
#define BYTES 64
#define TOKENS 4
typedef __m512i vec;
static inline vec load(const void *at) { return _mm512_loadu_si512(at); }
static inline vec two_bits(vec u, int at) { return _mm512_and_si512(_mm512_srli_epi16(u, at), _mm512_set1_epi8(3)); }
static inline vec absolute(vec v) { return _mm512_abs_epi8(v); }
static inline vec signed_as(vec w, vec v) {
  return _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(v), _mm512_setzero_si512(), w);
}
static inline vec step(vec s, vec u, vec v) { return _mm512_dpbusd_epi32(s, u, v); }
static inline __m256i widen(vec s) {
  return _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
}
#elif defined __AVX2__
#include <immintrin.h>
#define BYTES 32
#define TOKENS 1
typedef __m256i vec;
static inline vec load(const void *at) { return _mm256_loadu_si256((const vec *)at); }
static inline vec two_bits(vec u, int at) { return _mm256_and_si256(_mm256_srli_epi16(u, at), _mm256_set1_epi8(3)); }
static inline vec absolute(vec v) { return _mm256_abs_epi8(v); }
static inline vec signed_as(vec w, vec v) { return _mm256_sign_epi8(w, v); }
#ifdef __AVXVNNI__
static inline vec step(vec s, vec u, vec v) { return _mm256_dpbusd_avx_epi32(s, u, v); }
static inline __m256i widen(vec s) { return s; }
#else
static inline vec step(vec s, vec u, vec v) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(u, v)); }
static inline __m256i widen(vec s) { return _mm256_madd_epi16(s, _mm256_set1_epi16(1)); }
#endif
#else
#define TOKENS 1
#endif

#ifdef BYTES
/* load weights, which are read once a token, so from memory; what follows 2 KB later is fetched meanwhile */
static inline vec stream(const void *at) {
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

/* rows of bytes that one thread computes for all tokens, so that they stay in its cache */
#define ROWS 16
static inline int64_t blocks(const matrix *m) { return (m->n_out / 4 + ROWS - 1) / ROWS; }

/* sum[t][k] = the product of row t of q (T, n) with the k-th codes + 1 of n bytes */
static inline void products(const uint8_t *codes, const int8_t *q, int64_t n, const int T, int32_t sum[][4]) {
  int64_t i = 0;
  memset(sum, 0, T * sizeof *sum);
#ifdef BYTES
  while (i + BYTES <= n) {
    vec s[TOKENS][4] = {0};
    const int64_t end = n - i > 32 * BYTES ? i + 32 * BYTES : n; /* 32 steps: 32 * 2 * 3 * 127 < 2^15 */
    for (; i + BYTES <= end; i += BYTES) {
      const vec four = stream(codes + i);
      const vec u[4] = {two_bits(four, 0), two_bits(four, 2), two_bits(four, 4), two_bits(four, 6)};
      for (int t = 0; t < T; t++) {
        vec v = load(q + t * n + i);
        __asm__("" : "+v"(v)); /* gcc would load it again for each k */
        for (int k = 0; k < 4; k++) s[t][k] = step(s[t][k], u[k], v);
      }
    }
    for (int t = 0; t < T; t++) {
      const __m256i wide[4] = {widen(s[t][0]), widen(s[t][1]), widen(s[t][2]), widen(s[t][3])};
      add_sums(wide, sum[t]);
    }
  }
#endif
  for (; i < n; i++)
    for (int t = 0; t < T; t++) {
      const int16_t four = codes[i], v = q[t * n + i];
      sum[t][0] += (int16_t)(four & 3) * v;
      sum[t][1] += (int16_t)(four >> 2 & 3) * v;
      sum[t][2] += (int16_t)(four >> 4 & 3) * v;
      sum[t][3] += (int16_t)(four >> 6) * v;
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
  float *a = malloc(n_rows * sizeof *a);
  int32_t *total = malloc(n_rows * sizeof *total);
#pragma omp parallel for schedule(static) if (n_rows * n_in > 65536)
  for (int64_t n = 0; n < n_rows; n++) {
    float *z = malloc(n_in * sizeof *z);
    const float r = norm ? 1.0f / sqrtf(mean[n] + eps) : 1.0f;
    for (int64_t i = 0; i < n_in; i++) z[i] = norm ? x[n * n_in + i] * r * norm[i] : x[n * n_in + i];
    for (int64_t i = 0; factor && i < n_in; i++) z[i] *= factor[n * n_in + i];
    total[n] = quantize(z, n_in, q + n * n_in, a + n);
    free(z);
  }
  int64_t n_blocks = 0, n_y = 0;
  for (int64_t m = 0; m < n_matrices; m++) n_blocks += blocks(matrices + m), n_y += matrices[m].n_out;
#pragma omp parallel for schedule(static) if (n_y * n_in > 65536)
  for (int64_t block = 0; block < n_blocks; block++) {
    const matrix *m = matrices;
    int64_t b = block, first = 0;
    for (; b >= blocks(m); m++) b -= blocks(m), first += m->n_out;
    const int64_t R = m->n_out / 4, r = b * ROWS, rows = R - r < ROWS ? R - r : ROWS;
    for (int64_t n = 0, T; n < n_rows; n += T) {
      int32_t sum[ROWS][TOKENS][4];
      T = n + TOKENS <= n_rows ? TOKENS : 1;
      for (int64_t i = 0; i < rows; i++) {
        const uint8_t *codes = m->codes + (r + i) * n_in;
        if (T == TOKENS) /* a constant, so that the loops over it are unrolled */
          products(codes, q + n * n_in, n_in, TOKENS, sum[i]);
        else
          products(codes, q + n * n_in, n_in, 1, sum[i]);
      }
      for (int64_t t = 0; t < T; t++)
        for (int k = 0; k < 4; k++) {
          const int64_t at = (n + t) * n_y + first + k * R + r;
          const float scale = m->scale * a[n + t];
          for (int64_t i = 0; i < rows; i++) {
            const float product = (float)(sum[i][t][k] - total[n + t]) / scale;
            y[at + i] = residual ? residual[at + i] + product : product;
          }
        }
    }
  }
  free(q), free(a), free(total);
}

/* the product of w and q, n numbers from -127 to 127 */
static int32_t dot(const int8_t *w, const int8_t *q, int64_t n) {
  int32_t sum[4] = {0};
  int64_t i = 0;
#ifdef BYTES
  __m256i s[4] = {0};
  for (; i + BYTES <= n; i += BYTES) { /* step takes |q|, and w with the sign of q: 2 * 127 * 127 < 2^15 */
    const vec v = load(q + i), zero = {0};
    s[0] = _mm256_add_epi32(s[0], widen(step(zero, absolute(v), signed_as(stream(w + i), v))));
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
#pragma omp parallel for schedule(static) if (n_out * n_in > 65536)
  for (int64_t first = 0; first < n_out; first += 8) /* of w, for the cache if x has many rows */
    for (int64_t n = 0; n < n_rows; n++)
      for (int64_t r = first; r < n_out && r < first + 8; r++)
        y[n * n_out + r] = (float)dot(w + r * n_in, q + n * n_in, n_in) / (scales[r] * a[n]);
  free(q), free(a);
}

/* y (n_out) = w (n_out, n_in) times x (n_in), in floats */
void float_linear(const float *w, int64_t n_out, int64_t n_in, const float *x, float *y) {
#pragma omp parallel for schedule(static) if (n_out * n_in > 65536)
  for (int64_t r = 0; r < n_out; r++) {
    const float *row = w + r * n_in;
    float s[64] = {0}; /* sums in vector registers */
    int64_t i = 0;
    for (; i + 64 <= n_in; i += 64)
      for (int k = 0; k < 64; k++) s[k] += row[i + k] * x[i + k];
    for (int k = 1; k < 64; k++) s[0] += s[k];
    for (; i < n_in; i++) s[0] += row[i] * x[i];
    y[r] = s[0];
  }
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
