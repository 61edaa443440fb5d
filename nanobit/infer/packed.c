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
#ifdef __AVX2__ /* 32 products an instruction, added in pairs in 16 bits: at most 3 * 2 * 127 each, 32 times */
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  while (i + 32 <= n) {
    __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int times = 0; times < 32 && i + 32 <= n; times++, i += 32) {
      const __m256i four = _mm256_loadu_si256((const __m256i *)(codes + i));
      const __m256i v = _mm256_loadu_si256((const __m256i *)(q + i));
      s[0] = _mm256_add_epi16(s[0], _mm256_maddubs_epi16(_mm256_and_si256(four, three), v));
      s[1] = _mm256_add_epi16(s[1], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(four, 2), three), v));
      s[2] = _mm256_add_epi16(s[2], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(four, 4), three), v));
      s[3] = _mm256_add_epi16(s[3], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(four, 6), three), v));
    }
    for (int k = 0; k < 4; k++) {
      int32_t part[8];
      _mm256_storeu_si256((__m256i *)part, _mm256_madd_epi16(s[k], ones));
      for (int j = 0; j < 8; j++) sum[k] += part[j];
    }
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
