/* Tiles with NEON (AArch64), and the dot-product instructions where the compiler may use them: 4 rows in a register.
 * Both multiply signed with signed, so stored values lose their offset first. Included by kernels.c. */
#include <arm_neon.h>

#define ROWS 4
#define bytes_v uint8x16_t
#define ints_v int32x4_t
#define floats_v float32x4_t
#define KERNEL(name) neon_##name
#define FUNCTION static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define PREFETCH(p) __builtin_prefetch(p)
#define AHEAD 1024
#define SIGNED(bits) 1

FUNCTION uint8x16_t neon_right(uint8x16_t v, const int right) { return vshlq_u8(v, vdupq_n_s8((int8_t)-right)); }
FUNCTION uint8x16_t neon_four(const int8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
}
FUNCTION uint8x16_t neon_eight(const int8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return vreinterpretq_u8_u64(vdupq_n_u64(word));
}
/* |w| <= 128 and |x| <= 127, so two products fit 16 bits. */
FUNCTION int32x4_t neon_dot(int32x4_t sum, uint8x16_t stored, uint8x16_t chosen) {
    int8x16_t w = vreinterpretq_s8_u8(stored), x = vreinterpretq_s8_u8(chosen);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, w, x);
#else
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
FUNCTION float32x4_t neon_halves(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

#define load_bytes(p) vld1q_u8(p)
#define shifted(v, right, mask) vandq_u8(neon_right(v, right), vdupq_n_u8(mask))
#define placed(v, right, base) vorrq_u8(shifted(v, right, 3), vreinterpretq_u8_u32(vdupq_n_u32(base)))
#define either(a, b) vorrq_u8(a, b)
#define four(p) neon_four(p)
#define eight(p) neon_eight(p)
#define true_values(v, bits) vsubq_u8(v, vdupq_n_u8((uint8_t)(1 << (bits - 1))))
#define chosen_of(x, index) vqtbl1q_u8(x, index)
#define no_ints() vdupq_n_s32(0)
#define whole(n) vdupq_n_s32(n)
#define dot(sum, w, x, bits) neon_dot(sum, w, x)
#define dot_chosen(dots, chosen, w, x, bits) (*(dots) = neon_dot(*(dots), w, x))
#define minus(a, b) vsubq_s32(a, b)
#define no_floats() vdupq_n_f32(0)
#define halves(p) neon_halves(p)
#define times(v, f) vmulq_n_f32(v, f)
#define add_product(sum, v, ints) vfmaq_f32(sum, v, vcvtq_f32_s32(ints))
#define store(p, v) vst1q_f32(p, v)
#include "kernels_tiles.h"
