/* Tiles with AVX-512 and VNNI: 16 rows in a register, four products a lane and instruction. Included by kernels.c. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#define ROWS 16
#define bytes_v __m512i
#define ints_v __m512i
#define floats_v __m512
#define KERNEL(name) avx512_##name
#define FUNCTION static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define AHEAD 8192
#define SIGNED(bits) 0 /* VNNI multiplies unsigned with signed: stored values as they are, the offset is undone */

FUNCTION __m512i avx512_right(__m512i v, const int right) {
    return right > 0 ? _mm512_srli_epi16(v, right > 0 ? right : 0) : right < 0 ? _mm512_slli_epi16(v, right < 0 ? -right : 0) : v;
}
FUNCTION __m512i avx512_four(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}
FUNCTION __m512i avx512_eight(const int8_t *p) {
    int64_t word;
    memcpy(&word, p, 8);
    return _mm512_set1_epi64(word);
}
FUNCTION void avx512_dot_chosen(__m512i *dots, __m512i *chosen, __m512i w, __m512i x, const int bits) {
    *dots = _mm512_dpbusd_epi32(*dots, w, x);
    *chosen = _mm512_dpbusd_epi32(*chosen, _mm512_set1_epi8((char)(1 << (bits - 1))), x);
}

#define load_bytes(p) _mm512_loadu_si512(p)
#define shifted(v, right, mask) _mm512_and_si512(avx512_right(v, right), _mm512_set1_epi8(mask))
#define placed(v, right, base) \
    _mm512_ternarylogic_epi32(avx512_right(v, right), _mm512_set1_epi8(3), _mm512_set1_epi32(base), 0xea) /* (v & 3) | base */
#define either(a, b) _mm512_or_si512(a, b)
#define four(p) avx512_four(p)
#define eight(p) avx512_eight(p)
#define true_values(v, bits) (v)
#define chosen_of(x, index) _mm512_shuffle_epi8(x, index)
#define no_ints() _mm512_setzero_si512()
#define whole(n) _mm512_set1_epi32(n)
#define dot(sum, w, x, bits) _mm512_dpbusd_epi32(sum, w, x)
#define dot_chosen avx512_dot_chosen
#define minus(a, b) _mm512_sub_epi32(a, b)
#define no_floats() _mm512_setzero_ps()
#define halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define times(v, f) _mm512_mul_ps(v, _mm512_set1_ps(f))
#define add_product(sum, v, ints) _mm512_fmadd_ps(v, _mm512_cvtepi32_ps(ints), sum)
#define store(p, v) _mm512_storeu_ps(p, v)
#include "kernels_tiles.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
