/* Tiles with AVX2, FMA and F16C: 8 rows in a register. Included by kernels.c.
 *
 * maddubs multiplies unsigned with signed and adds two products in 16 bits. Values of up to 4 bits stay below that
 * with their offset; 8-bit values go in as |w| times sign(w) x, at most 2 * 128 * 127. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define ROWS 8
#define bytes_v __m256i
#define ints_v __m256i
#define floats_v __m256
#define KERNEL(name) avx2_##name
#define FUNCTION static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define AHEAD 8192
#define SIGNED(bits) ((bits) == 8)

FUNCTION __m256i avx2_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
FUNCTION __m256i avx2_right(__m256i v, const int right) {
    return right > 0 ? _mm256_srli_epi16(v, right > 0 ? right : 0) : right < 0 ? _mm256_slli_epi16(v, right < 0 ? -right : 0) : v;
}
FUNCTION __m256i avx2_four(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}
FUNCTION __m256i avx2_eight(const int8_t *p) {
    int64_t word;
    memcpy(&word, p, 8);
    return _mm256_set1_epi64x(word);
}
FUNCTION __m256i avx2_pairs(__m256i w, __m256i x, const int bits) {
    return bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
}
FUNCTION __m256i avx2_add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
FUNCTION void avx2_dot_chosen(__m256i *dots, __m256i *chosen, __m256i w, __m256i x, const int bits) {
    *dots = avx2_add_pairs(*dots, avx2_pairs(w, x, bits));
    if (bits < 8) *chosen = avx2_add_pairs(*chosen, _mm256_maddubs_epi16(_mm256_set1_epi8((char)(1 << (bits - 1))), x));
}
static void avx2_round(const float *part, int8_t *q, float *scale, int32_t *sums) { round_unit(part, q, scale, sums); }

#define load_bytes(p) avx2_load(p)
#define shifted(v, right, mask) _mm256_and_si256(avx2_right(v, right), _mm256_set1_epi8(mask))
#define placed(v, right, base) _mm256_or_si256(shifted(v, right, 3), _mm256_set1_epi32(base))
#define either(a, b) _mm256_or_si256(a, b)
#define four(p) avx2_four(p)
#define eight(p) avx2_eight(p)
#define true_values(v, bits) ((bits) == 8 ? _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80)) : (v))
#define chosen_of(x, index) _mm256_shuffle_epi8(x, index)
#define no_ints() _mm256_setzero_si256()
#define whole(n) _mm256_set1_epi32(n)
#define dot(sum, w, x, bits) avx2_add_pairs(sum, avx2_pairs(w, x, bits))
#define dot_chosen avx2_dot_chosen
#define minus(a, b) _mm256_sub_epi32(a, b)
#define no_floats() _mm256_setzero_ps()
#define halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define times(v, f) _mm256_mul_ps(v, _mm256_set1_ps(f))
#define add_product(sum, v, ints) _mm256_fmadd_ps(v, _mm256_cvtepi32_ps(ints), sum)
#define store(p, v) _mm256_storeu_ps(p, v)
#include "kernels_tiles.h"

static float avx2_float_dot(const compot_leaf *leaf, const uint8_t *row, const float *x) {
    __m256 sum = _mm256_setzero_ps();
    int64_t n = leaf->inputs, i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 w;
        __m128i half = _mm_setzero_si128();
        if (leaf->kind != COMPOT_F32) half = _mm_loadu_si128((const __m128i *)(const void *)(row + 2 * i));
        if (leaf->kind == COMPOT_F32) w = _mm256_loadu_ps((const float *)(const void *)(row + 4 * i));
        else if (leaf->kind == COMPOT_F16) w = _mm256_cvtph_ps(half);
        else w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i), sum);
    }
    float rest = 0;
    for (; i < n; i++) rest += float_value(leaf, row, i) * x[i];
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s))) + rest;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
