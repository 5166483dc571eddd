/* The dot products for NEON (AArch64), with the dot-product instructions where the compiler may use them.
 * Included by kernels.c alone. */
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

/* 16 signed products added to four sums. |w| <= 128 and |x| <= 127, so two products fit int16. */
INLINE int32x4_t neon_dot16(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, w, x);
#else
    int16x8_t p = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    return vpadalq_s16(sum, vmlal_s8(p, vget_high_s8(w), vget_high_s8(x)));
#endif
}

/* 16 slots: `bits` at a shift that may differ between the first and the last eight. */
INLINE uint8x16_t neon_shifted(uint8x16_t bytes, int first, int last, int mask) {
    int8x16_t by = vcombine_s8(vdup_n_s8((int8_t)-first), vdup_n_s8((int8_t)-last));
    return vandq_u8(vshlq_u8(bytes, by), vdupq_n_u8((uint8_t)mask));
}

INLINE uint8x16_t neon_twice(const uint8_t *p) {
    uint8x8_t half = vld1_u8(p);
    return vcombine_u8(half, half);
}

/* 32 slots of a 2-bit plane of 8 bytes and of a 1-bit plane of 4 bytes, as two registers. */
INLINE void neon_slots2(const uint8_t *p, uint8x16_t out[2]) {
    uint8x16_t bytes = neon_twice(p);
    out[0] = neon_shifted(bytes, 0, 2, 3);
    out[1] = neon_shifted(bytes, 4, 6, 3);
}
INLINE void neon_slots1(const uint8_t *p, uint8x16_t out[2]) {
    uint32_t word;
    memcpy(&word, p, 4);
    uint32x4_t all = vdupq_n_u32(word);
    static const int32_t shifts[8] = {0, -1, -2, -3, -4, -5, -6, -7};
    for (int i = 0; i < 2; i++)
        out[i] = vandq_u8(vreinterpretq_u8_u32(vshlq_u32(all, vld1q_s32(shifts + 4 * i))), vdupq_n_u8(1));
}

INLINE void neon_third_bit(uint8x16_t low[2], const uint8x16_t high[2]) {
    for (int i = 0; i < 2; i++) low[i] = vorrq_u8(low[i], vshlq_n_u8(high[i], 2));
}

/* True values (offset undone) of a sparse record, 32, or of a dense one, 64. */
INLINE void neon_sparse_values(const uint8_t *p, const int bits, int8x16_t w[2]) {
    uint8x16_t v[2];
    if (bits == 8) {
        w[0] = vld1q_s8((const int8_t *)p), w[1] = vld1q_s8((const int8_t *)p + 16);
        return;
    }
    if (bits == 4) {
        uint8x16_t q = vld1q_u8(p);
        v[0] = vandq_u8(q, vdupq_n_u8(15)), v[1] = vshrq_n_u8(q, 4);
    } else {
        neon_slots2(p, v);
        if (bits == 3) {
            uint8x16_t high[2];
            neon_slots1(p + 8, high);
            neon_third_bit(v, high);
        }
    }
    for (int i = 0; i < 2; i++) w[i] = vsubq_s8(vreinterpretq_s8_u8(v[i]), vdupq_n_s8((int8_t)(1 << (bits - 1))));
}

INLINE void neon_dense_values(const uint8_t *p, const int bits, int8x16_t w[4]) {
    uint8x16_t v[4];
    if (bits == 8) {
        for (int i = 0; i < 4; i++) w[i] = vld1q_s8((const int8_t *)p + 16 * i);
        return;
    }
    if (bits == 4) {
        for (int i = 0; i < 2; i++) {
            uint8x16_t q = vld1q_u8(p + 16 * i);
            v[i] = vandq_u8(q, vdupq_n_u8(15)), v[2 + i] = vshrq_n_u8(q, 4);
        }
    } else {
        uint8x16_t q = vld1q_u8(p);
        for (int i = 0; i < 4; i++) v[i] = neon_shifted(q, 2 * i, 2 * i, 3);
        if (bits == 3) {
            uint8x16_t h = neon_twice(p + 16);
            for (int i = 0; i < 4; i++) v[i] = vorrq_u8(v[i], vshlq_n_u8(neon_shifted(h, 2 * i, 2 * i + 1, 1), 2));
        }
    }
    for (int i = 0; i < 4; i++) w[i] = vsubq_s8(vreinterpretq_s8_u8(v[i]), vdupq_n_s8((int8_t)(1 << (bits - 1))));
}

INLINE float neon_planes(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, const int bits,
                         const int of) {
    static const uint8_t bases[2][16] = {{0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28},
                                         {0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24}};
    const int values = (of == 1 ? 64 : 32) * bits / 8, stride = values + (of == 1 ? 0 : of == 4 ? 8 : 12);
    const uint8x16_t base = vld1q_u8(bases[of == 8]);
    const uint8_t *record = row + 2 * groups_of(leaf);
    int64_t units = compot_units(leaf->inputs);
    float32x4_t sum = vdupq_n_f32(0);
    for (int64_t first = 0; first < units; first += CHUNK) {
        int64_t count = units - first < CHUNK ? units - first : CHUNK;
        float d[2 * CHUNK];
        plane_scales(leaf, row, 2 * first, 2 * count, d);
        for (int64_t h = 0; h < 2 * count; h++) d[h] *= x->scale[first + (h >> 1)];
        for (int64_t u = 0; u < count; u++, record += stride) {
            const int8_t *q = x->q + 64 * (first + u);
            int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
            if (of == 1) {
                int8x16_t w[4];
                neon_dense_values(record, bits, w);
                low = neon_dot16(neon_dot16(low, w[0], vld1q_s8(q)), w[1], vld1q_s8(q + 16));
                high = neon_dot16(neon_dot16(high, w[2], vld1q_s8(q + 32)), w[3], vld1q_s8(q + 48));
            } else {
                int8x16_t w[2];
                uint8x16_t at[2];
                neon_sparse_values(record, bits, w);
                neon_slots2(record + values, at);
                if (of == 8) {
                    uint8x16_t third[2];
                    neon_slots1(record + values + 8, third);
                    neon_third_bit(at, third);
                }
                int8x16x2_t x0 = {{vld1q_s8(q), vld1q_s8(q + 16)}}, x1 = {{vld1q_s8(q + 32), vld1q_s8(q + 48)}};
                low = neon_dot16(low, w[0], vqtbl2q_s8(x0, vorrq_u8(at[0], base)));
                high = neon_dot16(high, w[1], vqtbl2q_s8(x1, vorrq_u8(at[1], base)));
            }
            sum = vfmaq_n_f32(sum, vcvtq_f32_s32(low), d[2 * u]);
            sum = vfmaq_n_f32(sum, vcvtq_f32_s32(high), d[2 * u + 1]);
        }
    }
    return vaddvq_f32(sum);
}

static float neon_blocks(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x) {
    int64_t blocks = (leaf->inputs + 31) / 32;
    float32x4_t sum = vdupq_n_f32(0);
    for (int64_t h = 0; h < blocks; h++) {
        const int8_t *q = x->q + 32 * h;
        int8x16_t w[2];
        float scale = load_half(row);
        if (leaf->kind == COMPOT_Q4_0) {
            neon_sparse_values(row + 2, 4, w);
            row += 18;
        } else {
            w[0] = vld1q_s8((const int8_t *)row + 2), w[1] = vld1q_s8((const int8_t *)row + 18);
            row += 34;
        }
        int32x4_t p = neon_dot16(neon_dot16(vdupq_n_s32(0), w[0], vld1q_s8(q)), w[1], vld1q_s8(q + 16));
        sum = vfmaq_n_f32(sum, vcvtq_f32_s32(p), scale * x->scale[h >> 1]);
    }
    return vaddvq_f32(sum);
}

static void neon_dots(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, int rows, float *out) {
#define CASE(bits, of)                                                                                                   \
    case bits * 16 + of:                                                                                                 \
        for (int r = 0; r < rows; r++) out[r] = neon_planes(leaf, row + r * leaf->row_bytes, x, bits, of);               \
        return;
    if (leaf->kind == COMPOT_Q4_0 || leaf->kind == COMPOT_Q8_0) {
        for (int r = 0; r < rows; r++) out[r] = neon_blocks(leaf, row + r * leaf->row_bytes, x);
        return;
    }
    switch (leaf->bits * 16 + leaf->of) {
        CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(8, 1)
        CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(8, 4)
        CASE(2, 8) CASE(3, 8) CASE(4, 8) CASE(8, 8)
    }
#undef CASE
    scalar_dots(leaf, row, x, rows, out);
}

static void neon_block(const int8_t *const w[4], const float *const d[4], int64_t units, const compot_activation *x,
                       float out[4]) {
    float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    for (int64_t h = 0; h < 2 * units; h++) {
        int8x16_t a = vld1q_s8(x->q + 32 * h), b = vld1q_s8(x->q + 32 * h + 16);
        float scale = x->scale[h >> 1];
        for (int r = 0; r < 4; r++) {
            int32x4_t p = neon_dot16(vdupq_n_s32(0), vld1q_s8(w[r] + 32 * h), a);
            p = neon_dot16(p, vld1q_s8(w[r] + 32 * h + 16), b);
            sums[r] = vfmaq_n_f32(sums[r], vcvtq_f32_s32(p), d[r][h] * scale);
        }
    }
    for (int r = 0; r < 4; r++) out[r] = vaddvq_f32(sums[r]);
}

#undef INLINE
