/* The dot products for AVX2 with FMA and F16C. Included by kernels.c alone.
 *
 * Stored values are unsigned (offset included), so maddubs multiplies them with the signed activations directly.
 * Dense rows undo the offset once per row with the sums of the activations; sparse rows, whose selection differs
 * from row to row, subtract offset times the selected activations. 8-bit values use |w| times sign(w) x. */
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float avx2_sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float avx2_half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

INLINE __m128i load64(const uint8_t *p) { return _mm_loadl_epi64((const __m128i *)(const void *)p); }
INLINE __m128i load128(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m256i mask8(__m256i v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }

static void avx2_round(const float *part, int8_t *q, float *scale, float *sum, float *total) {
    round_unit(part, q, scale, sum, total);
}

/* 32 slots of a 2-bit plane of 8 bytes, and of a 1-bit plane of 4 bytes. */
INLINE __m256i slots2(const uint8_t *p) {
    return mask8(_mm256_srlv_epi64(_mm256_broadcastq_epi64(load64(p)), _mm256_setr_epi64x(0, 2, 4, 6)), 3);
}
INLINE __m256i slots1(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return mask8(_mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), 1);
}
INLINE __m256i shifted_or(__m256i low, __m256i high) { return _mm256_or_si256(low, _mm256_slli_epi16(high, 2)); }

/* 32 stored values of a sparse record. */
INLINE __m256i sparse_values(const uint8_t *p, const int bits) {
    if (bits == 8) return load256(p);
    if (bits == 4) {
        __m128i q = load128(p);
        return mask8(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), 15);
    }
    __m256i low = slots2(p);
    return bits == 3 ? shifted_or(low, slots1(p + 8)) : low;
}

/* 64 stored values of a dense record, the first and the second half. */
INLINE void dense_values(const uint8_t *p, const int bits, __m256i *a, __m256i *b) {
    if (bits == 8) {
        *a = load256(p);
        *b = load256(p + 32);
    } else if (bits == 4) {
        __m256i q = load256(p);
        *a = mask8(q, 15);
        *b = mask8(_mm256_srli_epi16(q, 4), 15);
    } else {
        __m256i q = _mm256_broadcastsi128_si256(load128(p));
        *a = mask8(_mm256_srlv_epi64(q, _mm256_setr_epi64x(0, 0, 2, 2)), 3);
        *b = mask8(_mm256_srlv_epi64(q, _mm256_setr_epi64x(4, 4, 6, 6)), 3);
        if (bits == 3) {
            __m256i h = _mm256_broadcastq_epi64(load64(p + 16));
            *a = shifted_or(*a, mask8(_mm256_srlv_epi64(h, _mm256_setr_epi64x(0, 1, 2, 3)), 1));
            *b = shifted_or(*b, mask8(_mm256_srlv_epi64(h, _mm256_setr_epi64x(4, 5, 6, 7)), 1));
        }
    }
}

/* Signed times signed, 32 products as 16 sums; |w| <= 128 and |x| <= 127 keep them inside int16. */
INLINE __m256i signed_products(__m256i w, __m256i x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
INLINE __m256 to_float(__m256i pairs) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Scales of a run of units: of the weights (own) and times those of the activations (d); one per unit, or one
 * per half when the groups are not whole units. */
INLINE void avx2_scales(const compot_leaf *leaf, const uint8_t *row, int64_t first, int64_t count,
                        const compot_activation *x, const int fine, float *d, float *own) {
    int64_t last = groups_of(leaf) - 1, i = 0;
    if (!fine) {
        if (leaf->group == 64)
            for (; i + 8 <= count; i += 8) {
                __m256 w = _mm256_cvtph_ps(load128(row + 2 * (first + i)));
                _mm256_storeu_ps(own + i, w);
                _mm256_storeu_ps(d + i, _mm256_mul_ps(w, _mm256_loadu_ps(x->scale + first + i)));
            }
        int shift = leaf->group & (leaf->group - 1) ? -1 : __builtin_ctz((unsigned)leaf->group);
        for (; i < count; i++) {
            int64_t at = 64 * (first + i), g = shift < 0 ? at / leaf->group : at >> shift;
            own[i] = avx2_half(row + 2 * (g < last ? g : last));
            d[i] = own[i] * x->scale[first + i];
        }
        return;
    }
    if (leaf->group == 32)
        for (; i + 8 <= 2 * count && 2 * first + i + 8 <= last + 1; i += 8) {
            __m256 w = _mm256_cvtph_ps(load128(row + 2 * (2 * first + i)));
            __m256 twice = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(x->scale + first + i / 2)),
                                                    _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
            _mm256_storeu_ps(own + i, w);
            _mm256_storeu_ps(d + i, _mm256_mul_ps(w, twice));
        }
    for (; i < 2 * count; i++) {
        int64_t g = leaf->group == 32 ? 2 * first + i : (2 * first + i) * 32 / leaf->group;
        own[i] = avx2_half(row + 2 * (g < last ? g : last));
        d[i] = own[i] * x->scale[first + (i >> 1)];
    }
}

/* What the offset of stored values added, in the units of a run. */
INLINE __m256 avx2_undo(const float *own, const float *sums, int64_t count, __m256 undo) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) undo = _mm256_fmadd_ps(_mm256_loadu_ps(own + i), _mm256_loadu_ps(sums + i), undo);
    for (; i < count; i++) undo = _mm256_add_ps(undo, _mm256_setr_ps(own[i] * sums[i], 0, 0, 0, 0, 0, 0, 0));
    return undo;
}

INLINE float avx2_planes(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, const int bits,
                         const int of, const int fine) {
    const int slots = of == 1 ? 64 : 32, values = slots * bits / 8, offset = bits == 8 ? 0 : 1 << (bits - 1);
    const int stride = values + (of == 1 ? 0 : of == 4 ? 8 : 12);
    const __m256i offsets = _mm256_set1_epi8((char)offset);
    const __m256i base = of == 4 ? _mm256_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8,
                                                    12, 12, 0, 0, 4, 4, 8, 8, 12, 12)
                                 : _mm256_setr_epi8(0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0, 8, 8, 8,
                                                    8, 0, 0, 0, 0, 8, 8, 8, 8);
    const uint8_t *record = row + 2 * groups_of(leaf);
    int64_t units = compot_units(leaf->inputs);
    __m256 sum = _mm256_setzero_ps(), undo = _mm256_setzero_ps();
    for (int64_t first = 0; first < units; first += CHUNK) {
        int64_t count = units - first < CHUNK ? units - first : CHUNK;
        float d[2 * CHUNK + 8], own[2 * CHUNK + 8];
        avx2_scales(leaf, row, first, count, x, fine, d, own);
        if (of == 1 && bits < 8)
            undo = fine ? avx2_undo(own, x->sum + 2 * first, 2 * count, undo)
                        : avx2_undo(own, x->total + first, count, undo);
        for (int64_t u = 0; u < count; u++, record += stride) {
            _mm_prefetch((const char *)record + 2048, _MM_HINT_T0);
            const int8_t *q = x->q + 64 * (first + u);
            if (of == 1) {
                __m256i a, b, xa = load256(q), xb = load256(q + 32);
                dense_values(record, bits, &a, &b);
                if (bits == 8) {
                    __m256 pa = to_float(signed_products(a, xa)), pb = to_float(signed_products(b, xb));
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(d[fine ? 2 * u : u]), pa, sum);
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(d[fine ? 2 * u + 1 : u]), pb, sum);
                } else if (fine) {
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(d[2 * u]), to_float(_mm256_maddubs_epi16(a, xa)), sum);
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(d[2 * u + 1]), to_float(_mm256_maddubs_epi16(b, xb)), sum);
                } else {
                    __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(a, xa), _mm256_maddubs_epi16(b, xb));
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(d[u]), to_float(p), sum);
                }
            } else {
                __m256i w = sparse_values(record, bits), ix = slots2(record + values);
                if (of == 8) ix = shifted_or(ix, slots1(record + values + 8));
                ix = _mm256_or_si256(ix, base);
                __m256i x0 = load256(q), x1 = load256(q + 32);
                __m256i low = _mm256_permute2x128_si256(x0, x1, 0x20), high = _mm256_permute2x128_si256(x0, x1, 0x31);
                __m256i s = _mm256_blend_epi32(_mm256_shuffle_epi8(low, ix), _mm256_shuffle_epi8(high, ix), 0xcc);
                __m256i p = bits == 8 ? signed_products(w, s)
                                      : _mm256_sub_epi16(_mm256_maddubs_epi16(w, s), _mm256_maddubs_epi16(offsets, s));
                __m256 scale = fine ? _mm256_set_m128(_mm_set1_ps(d[2 * u + 1]), _mm_set1_ps(d[2 * u]))
                                    : _mm256_set1_ps(d[u]);
                sum = _mm256_fmadd_ps(scale, to_float(p), sum);
            }
        }
    }
    if (of == 1 && bits < 8) sum = _mm256_fnmadd_ps(_mm256_set1_ps((float)offset), undo, sum);
    return avx2_sum(sum);
}

#define PLANES(bits, of)                                                                                              \
    static void avx2_planes_##bits##_##of(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x,    \
                                          int rows, float *out) {                                                     \
        for (int r = 0; r < rows; r++) out[r] = avx2_planes(leaf, row + r * leaf->row_bytes, x, bits, of, 0);         \
    }                                                                                                                 \
    static void avx2_fine_##bits##_##of(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x,      \
                                        int rows, float *out) {                                                       \
        for (int r = 0; r < rows; r++) out[r] = avx2_planes(leaf, row + r * leaf->row_bytes, x, bits, of, 1);         \
    }
PLANES(2, 1) PLANES(3, 1) PLANES(4, 1) PLANES(8, 1)
PLANES(2, 4) PLANES(3, 4) PLANES(4, 4) PLANES(8, 4)
PLANES(2, 8) PLANES(3, 8) PLANES(4, 8) PLANES(8, 8)
#undef PLANES

static float avx2_q4_0(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x) {
    int64_t blocks = (leaf->inputs + 31) / 32;
    __m256 sum = _mm256_setzero_ps();
    const __m256i eight = _mm256_set1_epi8(8);
    for (int64_t h = 0; h < blocks; h++, row += 18) {
        _mm_prefetch((const char *)row + 2048, _MM_HINT_T0);
        __m128i q = load128(row + 2);
        __m256i w = mask8(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), 15), s = load256(x->q + 32 * h);
        __m256i p = _mm256_sub_epi16(_mm256_maddubs_epi16(w, s), _mm256_maddubs_epi16(eight, s));
        sum = _mm256_fmadd_ps(_mm256_set1_ps(avx2_half(row) * x->scale[h >> 1]), to_float(p), sum);
    }
    return avx2_sum(sum);
}

static float avx2_q8_0(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x) {
    int64_t blocks = (leaf->inputs + 31) / 32;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t h = 0; h < blocks; h++, row += 34) {
        __m256i p = signed_products(load256(row + 2), load256(x->q + 32 * h));
        sum = _mm256_fmadd_ps(_mm256_set1_ps(avx2_half(row) * x->scale[h >> 1]), to_float(p), sum);
    }
    return avx2_sum(sum);
}

static void avx2_dots(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, int rows, float *out) {
    int fine = leaf->group % 64 != 0 && leaf->group < leaf->inputs;
    if (leaf->kind == COMPOT_Q4_0) {
        for (int r = 0; r < rows; r++) out[r] = avx2_q4_0(leaf, row + r * leaf->row_bytes, x);
        return;
    }
    if (leaf->kind == COMPOT_Q8_0) {
        for (int r = 0; r < rows; r++) out[r] = avx2_q8_0(leaf, row + r * leaf->row_bytes, x);
        return;
    }
#define CASE(bits, of)                                                     \
    case bits * 16 + of:                                                   \
        if (fine) avx2_fine_##bits##_##of(leaf, row, x, rows, out);        \
        else avx2_planes_##bits##_##of(leaf, row, x, rows, out);           \
        return;
    switch (leaf->bits * 16 + leaf->of) {
        CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(8, 1)
        CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(8, 4)
        CASE(2, 8) CASE(3, 8) CASE(4, 8) CASE(8, 8)
    }
#undef CASE
    scalar_dots(leaf, row, x, rows, out);
}

/* decode_row with vector unpacking; sparse slots are still put in place one by one. */
static void avx2_decode(const compot_leaf *leaf, const uint8_t *row, int8_t *w, float *d) {
    int64_t units = compot_units(leaf->inputs), blocks = (leaf->inputs + 31) / 32;
    if (leaf->kind == COMPOT_Q4_0) {
        for (int64_t h = 0; h < 2 * units; h++, row += 18) {
            d[h] = 0;
            if (h >= blocks) {
                memset(w + 32 * h, 0, 32);
                continue;
            }
            __m128i q = load128(row + 2);
            __m256i v = mask8(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), 15);
            d[h] = avx2_half(row);
            _mm256_storeu_si256((__m256i *)(void *)(w + 32 * h), _mm256_sub_epi8(v, _mm256_set1_epi8(8)));
        }
        return;
    }
    if (leaf->kind != COMPOT_PLANES) {
        decode_row(leaf, row, w, d);
        return;
    }
    const uint8_t *record = row + 2 * groups_of(leaf);
    const int bits = leaf->bits, of = leaf->of;
    int64_t stride = record_bytes(leaf), values = value_bytes(leaf), last = groups_of(leaf) - 1;
    const __m256i offsets = _mm256_set1_epi8((char)offset_of(leaf));
    int shift = leaf->group & (leaf->group - 1) ? -1 : __builtin_ctz((unsigned)leaf->group);
    for (int64_t h = 0; h < 2 * units; h++) {
        int64_t g = shift < 0 ? h * 32 / leaf->group : h * 32 >> shift;
        d[h] = avx2_half(row + 2 * (g < last ? g : last));
    }
    for (int64_t u = 0; u < units; u++, record += stride, w += 64) {
        __m256i a, b;
        if (of == 1) {
            if (bits == 4) dense_values(record, 4, &a, &b);
            else if (bits == 8) dense_values(record, 8, &a, &b);
            else if (bits == 3) dense_values(record, 3, &a, &b);
            else dense_values(record, 2, &a, &b);
            _mm256_storeu_si256((__m256i *)(void *)w, _mm256_sub_epi8(a, offsets));
            _mm256_storeu_si256((__m256i *)(void *)(w + 32), _mm256_sub_epi8(b, offsets));
            continue;
        }
        int8_t slots[32];
        uint8_t places[32];
        __m256i ix = slots2(record + values);
        if (of == 8) ix = shifted_or(ix, slots1(record + values + 8));
        a = bits == 4 ? sparse_values(record, 4) : bits == 8 ? sparse_values(record, 8)
            : bits == 3 ? sparse_values(record, 3) : sparse_values(record, 2);
        _mm256_storeu_si256((__m256i *)(void *)slots, _mm256_sub_epi8(a, offsets));
        _mm256_storeu_si256((__m256i *)(void *)places, ix);
        memset(w, 0, 64);
        if (of == 4)
            for (int i = 0; i < 32; i++) w[i / 2 * 4 + places[i]] = (int8_t)(w[i / 2 * 4 + places[i]] + slots[i]);
        else
            for (int i = 0; i < 32; i++) w[i / 4 * 8 + places[i]] = (int8_t)(w[i / 4 * 8 + places[i]] + slots[i]);
    }
}

static void avx2_block(const int8_t *const w[4], const float *const d[4], int64_t units,
                       const compot_activation *x, float out[4]) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t u = 0; u < units; u++) {
        __m256i xa = load256(x->q + 64 * u), xb = load256(x->q + 64 * u + 32);
        float scale = x->scale[u];
        for (int r = 0; r < 4; r++) {
            __m256 pa = to_float(signed_products(load256(w[r] + 64 * u), xa));
            __m256 pb = to_float(signed_products(load256(w[r] + 64 * u + 32), xb));
            sums[r] = _mm256_fmadd_ps(_mm256_set1_ps(d[r][2 * u] * scale), pa, sums[r]);
            sums[r] = _mm256_fmadd_ps(_mm256_set1_ps(d[r][2 * u + 1] * scale), pb, sums[r]);
        }
    }
    for (int r = 0; r < 4; r++) out[r] = avx2_sum(sums[r]);
}

static float avx2_float_dot(const compot_leaf *leaf, const uint8_t *row, const float *x) {
    __m256 sum = _mm256_setzero_ps();
    int64_t n = leaf->inputs, i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 w;
        if (leaf->kind == COMPOT_F32) w = _mm256_loadu_ps((const float *)(const void *)(row + 4 * i));
        else if (leaf->kind == COMPOT_F16) w = _mm256_cvtph_ps(load128(row + 2 * i));
        else w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(row + 2 * i)), 16));
        sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i), sum);
    }
    float rest = 0;
    for (; i < n; i++) {
        float w;
        if (leaf->kind == COMPOT_F32) memcpy(&w, row + 4 * i, 4);
        else w = leaf->kind == COMPOT_F16 ? avx2_half(row + 2 * i) : load_bfloat(row + 2 * i);
        rest += w * x[i];
    }
    return avx2_sum(sum) + rest;
}

#undef INLINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
