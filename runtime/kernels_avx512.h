/* The dot products for AVX-512 with VBMI and VNNI: two units, 128 inputs, per step. Included by kernels.c alone.
 *
 * One byte permutation over 128 activations selects those of 64 sparse slots; VNNI sums four products at once.
 * What is rarer than 4-bit and 2-bit planes goes to the AVX2 kernels. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c")
#endif

#define INLINE static inline __attribute__((always_inline))
/* A rolled loop would keep the sums of its rows in memory, and wait for them. */
#define UNROLL _Pragma("GCC unroll 4")

INLINE __m512i mask512(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }

/* Byte indices for the permutations below; filled once, because compilers build such constants anew in every call.
 *
 * The bytes of 64 slots of two records come together in groups of four: the even dwords are slots of the first unit,
 * the odd ones of the second, so that pairs of scales are spread by a broadcast. */
typedef struct {
    int8_t values[64], low[64], high[64]; /* planes: 4-bit values, low and high bits of positions */
    int8_t base[64];                      /* where the group of each slot begins, within 128 inputs */
} avx512_table;

static avx512_table tables[2]; /* of 2:4 and 4:8 codes of 4 bits */
static int8_t table_dense2[64];

static void avx512_prepare(void) {
    for (int which = 0; which < 2; which++) {
        int of = which ? 8 : 4, stride = which ? 28 : 24;
        for (int i = 0; i < 64; i++) {
            int slot = i / 8 * 4 + i % 4, second = i / 4 % 2;
            tables[which].values[i] = (int8_t)(second * stride + slot % 16);
            tables[which].low[i] = (int8_t)(second * stride + 16 + slot % 8);
            tables[which].high[i] = (int8_t)(second * stride + 24 + slot % 4);
            tables[which].base[i] = (int8_t)(second * 64 + slot / (of / 2) * of);
        }
    }
    for (int i = 0; i < 64; i++) table_dense2[i] = (int8_t)(i / 32 * 16 + i % 16);
}

/* Sums of 16 lanes of four registers, in one order. */
INLINE void sums512(const __m512 *v, const int rows, float *out) {
    UNROLL for (int r = 0; r < rows; r++)
        out[r] = avx2_sum(_mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v[r]), 1))));
}

/* `rows` neighbouring rows at once: they share the activations, and their chains of sums overlap. */
INLINE void avx512_planes(const compot_leaf *leaf, const uint8_t *data, const compot_activation *x, const int bits,
                          const int of, const int fine, const int rows, float *out) {
    const int slots = of == 1 ? 64 : 32, values = slots * bits / 8, offset = 1 << (bits - 1);
    const int stride = values + (of == 1 ? 0 : of == 4 ? 8 : 12);
    const __mmask64 one = ((__mmask64)1 << (stride - 1) << 1) - 1;
    const __mmask64 two = stride == 32 ? ~(__mmask64)0 : ((__mmask64)1 << 2 * stride) - 1;
    const __m512i by_nibble = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4), by_crumb = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
    const __m512i by_bit = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), offsets = _mm512_set1_epi8((char)offset);
    const avx512_table *table = &tables[of == 8];
    const __m512i at_values = _mm512_loadu_si512(table->values), at_low = _mm512_loadu_si512(table->low);
    const __m512i at_high = _mm512_loadu_si512(table->high), base = _mm512_loadu_si512(table->base);
    const __m512i at_dense2 = _mm512_loadu_si512(table_dense2);
    const __m512i halves = _mm512_setr_epi32(0, 2, 0, 2, 0, 2, 0, 2, 1, 3, 1, 3, 1, 3, 1, 3);
    int64_t units = compot_units(leaf->inputs), head = 2 * groups_of(leaf), bytes_of_row = leaf->row_bytes;
    __m512 sums[4];
    __m256 undo[4];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps(), undo[r] = _mm256_setzero_ps();
    for (int64_t first = 0; first < units; first += CHUNK) {
        int64_t count = units - first < CHUNK ? units - first : CHUNK;
        float d[4][2 * CHUNK + 16], own[2 * CHUNK + 16];
        UNROLL for (int r = 0; r < rows; r++) {
            avx2_scales(leaf, data + r * bytes_of_row, first, count, x, fine, d[r], own);
            int64_t end = fine ? 2 * count : count; /* the second unit of a last odd step */
            d[r][end] = d[r][end + 1] = 0;
            if (of == 1)
                undo[r] = fine ? avx2_undo(own, x->sum + 2 * first, 2 * count, undo[r])
                               : avx2_undo(own, x->total + first, count, undo[r]);
        }
        for (int64_t u = 0; u < count; u += 2) {
            const int8_t *q = x->q + 64 * (first + u);
            const uint8_t *record = data + head + (first + u) * stride;
            int pair = u + 1 < count;
            __m512i x0 = _mm512_loadu_si512(q), x1 = pair ? _mm512_loadu_si512(q + 64) : _mm512_setzero_si512();
            __m512i xa = _mm512_shuffle_i64x2(x0, x1, 0x44), xb = _mm512_shuffle_i64x2(x0, x1, 0xee);
            UNROLL for (int r = 0; r < rows; r++, record += bytes_of_row) {
                __m512i bytes = _mm512_maskz_loadu_epi8(pair ? two : one, record);
                const float *scale = d[r] + (fine ? 2 * u : u);
                _mm_prefetch((const char *)record + 2048, _MM_HINT_T0);
                if (of == 1) {
                    __m512i a, b;
                    if (bits == 4) {
                        a = mask512(bytes, 15), b = mask512(_mm512_srli_epi16(bytes, 4), 15);
                    } else {
                        __m512i w = _mm512_permutexvar_epi8(at_dense2, bytes);
                        a = mask512(_mm512_srlv_epi64(w, _mm512_setr_epi64(0, 0, 2, 2, 0, 0, 2, 2)), 3);
                        b = mask512(_mm512_srlv_epi64(w, _mm512_setr_epi64(4, 4, 6, 6, 4, 4, 6, 6)), 3);
                    }
                    /* lanes 0-7 are the first unit, 8-15 the second */
                    const int next = fine ? 2 : 1;
                    __m512 s = _mm512_mask_mov_ps(_mm512_set1_ps(scale[0]), 0xff00, _mm512_set1_ps(scale[next]));
                    if (fine) {
                        __m512 t = _mm512_mask_mov_ps(_mm512_set1_ps(scale[1]), 0xff00, _mm512_set1_ps(scale[3]));
                        __m512i pa = _mm512_dpbusd_epi32(_mm512_setzero_si512(), a, xa);
                        __m512i pb = _mm512_dpbusd_epi32(_mm512_setzero_si512(), b, xb);
                        sums[r] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(pa), sums[r]);
                        sums[r] = _mm512_fmadd_ps(t, _mm512_cvtepi32_ps(pb), sums[r]);
                    } else {
                        __m512i p = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), a, xa), b, xb);
                        sums[r] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(p), sums[r]);
                    }
                } else {
                    __m512i w = mask512(_mm512_srlv_epi64(_mm512_permutexvar_epi8(at_values, bytes), by_nibble), 15);
                    __m512i ix = mask512(_mm512_srlv_epi64(_mm512_permutexvar_epi8(at_low, bytes), by_crumb), 3);
                    if (of == 8) {
                        __m512i h = mask512(_mm512_srlv_epi64(_mm512_permutexvar_epi8(at_high, bytes), by_bit), 1);
                        ix = _mm512_or_si512(ix, _mm512_slli_epi16(h, 2));
                    }
                    __m512i s = _mm512_permutex2var_epi8(x0, _mm512_or_si512(ix, base), x1);
                    __m512i p = _mm512_sub_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, s),
                                                 _mm512_dpbusd_epi32(_mm512_setzero_si512(), offsets, s));
                    __m512 t;
                    if (fine) {
                        t = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
                    } else {
                        double both;
                        memcpy(&both, scale, 8);
                        t = _mm512_castpd_ps(_mm512_set1_pd(both));
                    }
                    sums[r] = _mm512_fmadd_ps(t, _mm512_cvtepi32_ps(p), sums[r]);
                }
            }
        }
    }
    sums512(sums, rows, out);
    if (of == 1)
        UNROLL for (int r = 0; r < rows; r++) out[r] -= (float)offset * avx2_sum(undo[r]);
}

#define PLANES(bits, of, fine)                                                                                          \
    static void avx512_##fine##_##bits##_##of(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, \
                                              int rows, float *out) {                                                   \
        for (int r = 0; r < rows; r++)                                                                                  \
            avx512_planes(leaf, row + r * leaf->row_bytes, x, bits, of, fine, 1, out + r);                              \
    }
PLANES(2, 1, 0) PLANES(4, 1, 0) PLANES(4, 4, 0) PLANES(4, 8, 0)
PLANES(2, 1, 1) PLANES(4, 1, 1) PLANES(4, 4, 1) PLANES(4, 8, 1)
#undef PLANES

static void avx512_dots(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, int rows, float *out) {
    if (leaf->kind == COMPOT_PLANES) {
        int fine = leaf->group % 64 != 0 && leaf->group < leaf->inputs;
#define CASE(bits, of)                                                     \
    case bits * 16 + of:                                                   \
        if (fine) avx512_1_##bits##_##of(leaf, row, x, rows, out);         \
        else avx512_0_##bits##_##of(leaf, row, x, rows, out);              \
        return;
        switch (leaf->bits * 16 + leaf->of) { CASE(2, 1) CASE(4, 1) CASE(4, 4) CASE(4, 8) }
#undef CASE
    }
    avx2_dots(leaf, row, x, rows, out);
}

/* |w| times sign(w) x, as in the AVX2 kernels: the sign comes as a mask. */
static void avx512_block(const int8_t *const w[4], const float *const d[4], int64_t units, const compot_activation *x,
                         float out[4]) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int64_t u = 0; u < units; u++) {
        __m512i q = _mm512_loadu_si512(x->q + 64 * u);
        __m512 scale = _mm512_set1_ps(x->scale[u]);
        for (int r = 0; r < 4; r++) {
            __m512i v = _mm512_loadu_si512(w[r] + 64 * u);
            __m512i signed_q = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(v), _mm512_setzero_si512(), q);
            __m512i p = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_abs_epi8(v), signed_q);
            __m512 own = _mm512_permutexvar_ps(
                spread, _mm512_castps128_ps512(_mm_castsi128_ps(load64((const uint8_t *)(const void *)(d[r] + 2 * u)))));
            sums[r] = _mm512_fmadd_ps(_mm512_mul_ps(own, scale), _mm512_cvtepi32_ps(p), sums[r]);
        }
    }
    for (int r = 0; r < 4; r++) out[r] = _mm512_reduce_add_ps(sums[r]);
}

#undef INLINE
#undef UNROLL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
