/* The dot products over tiles, once for every instruction set: included by kernels_<isa>.h, which defines
 *
 *   ROWS                     rows in one register: bytes hold 4 slots of each, ints and floats one lane of each
 *   bytes_v, ints_v, floats_v
 *   KERNEL(name)             the name of this instruction set's version
 *   FUNCTION                 how a function that must be inlined is declared
 *   SIGNED(bits)             whether true_values undoes the offset of stored values (otherwise the sums are undone)
 *   load_bytes(p), shifted(v, right, mask), placed(v, right, base), either(a, b)
 *   four(p), eight(p)        4 or 8 activations repeated over the register
 *   true_values(v, bits), chosen_of(x, index)
 *   no_ints(), whole(n), dot(sum, w, x), dot_chosen(sum, chosen, w, x, bits), minus(a, b)
 *   no_floats(), halves(p), times(v, f), add_product(sum, v, ints), store(p, v)
 *
 * and undefines them. Every instruction set adds the same float32 numbers in the same order, unit after unit with
 * one fused multiply-add, so results are the same bits everywhere. */

#define MOST_TOKENS 4

/* Stored values of vector j: 4 neighbouring slots of each row. */
FUNCTION bytes_v KERNEL(values)(const uint8_t *unit, const int j, const int vectors, const int bits) {
    if (bits == 8) return load_bytes(unit + 64 * j);
    if (bits == 4) return shifted(load_bytes(unit + 64 * (j / 2)), 4 * (j % 2), 15);
    bytes_v low = shifted(load_bytes(unit + 64 * (j / 4)), 2 * (j % 4), 3);
    if (bits == 2) return low;
    return either(low, shifted(load_bytes(unit + 16 * vectors + 64 * (j / 8)), j % 8 - 2, 4));
}

/* Where vector j finds its activations among eight. */
FUNCTION bytes_v KERNEL(places)(const uint8_t *plane, const int j, const int of) {
    bytes_v low = load_bytes(plane + 64 * (j / 4));
    if (of == 4) return placed(low, 2 * (j % 4), 0x04040000u);
    return either(shifted(low, 2 * (j % 4), 3), shifted(load_bytes(plane + 128), j % 8 - 2, 4));
}

FUNCTION void KERNEL(tile)(const compot_tiles *t, const uint8_t *tile, const compot_activation *x, const int bits,
                           const int of, const int fine, const int tokens, float *out) {
    const int vectors = of == 1 ? 16 : 8, places_at = 8 * vectors * bits;
    const int unit_bytes = places_at + (of == 1 ? 0 : of == 4 ? 128 : 192), lines = unit_bytes / 64;
    const int offset = SIGNED(bits) ? 0 : 1 << (bits - 1);
    for (int part = 0; part < COMPOT_TILE / ROWS; part++) {
        const uint8_t *unit = tile + t->head + 4 * ROWS * part, *scales = tile + 2 * ROWS * part;
        floats_v sums[MOST_TOKENS];
        if (part == 0) /* of what lies AHEAD, the units below fetch all but the first `head` bytes */
            for (int64_t i = 0; i < t->head; i += 64) PREFETCH(tile + AHEAD + i);
        UNROLL for (int i = 0; i < tokens; i++) sums[i] = no_floats();
        for (int64_t u = 0; u < t->units; u++, unit += unit_bytes) {
            ints_v dots[MOST_TOKENS], chosen[MOST_TOKENS];
            UNROLL for (int half = 0; half < 2; half++) {
                if (half == 0 || fine)
                    UNROLL for (int i = 0; i < tokens; i++) {
                        const int32_t *all = x[i].sums + 2 * u;
                        dots[i] = of == 1 && offset ? whole(-offset * (fine ? all[half] : all[0] + all[1])) : no_ints();
                        chosen[i] = no_ints();
                    }
                UNROLL for (int k = 0; k < vectors / 2; k++) {
                    const int j = half * vectors / 2 + k;
                    if (part == 0) /* one line at a time: a burst of them waits for itself */
                        for (int i = j * lines / vectors; i < (j + 1) * lines / vectors; i++) PREFETCH(unit + AHEAD + 64 * i);
                    bytes_v w = true_values(KERNEL(values)(unit, j, vectors, bits), bits);
                    if (of == 1) {
                        ints_v *into = half && !fine ? chosen : dots; /* two chains of sums wait less than one */
                        UNROLL for (int i = 0; i < tokens; i++) into[i] = dot(into[i], w, four(x[i].q + 64 * u + 4 * j), bits);
                    } else {
                        bytes_v at = KERNEL(places)(unit + places_at, j, of);
                        UNROLL for (int i = 0; i < tokens; i++)
                            dot_chosen(&dots[i], &chosen[i], w, chosen_of(eight(x[i].q + 64 * u + 8 * j), at), bits);
                    }
                }
                if (half == 1 || fine) {
                    int64_t group = fine ? 2 * u + half : t->per_scale == 1 ? u : (int32_t)u / t->per_scale;
                    floats_v own = halves(scales + 2 * COMPOT_TILE * group);
                    UNROLL for (int i = 0; i < tokens; i++) {
                        ints_v n = dots[i];
                        if (of == 1 && !fine) n = minus(n, minus(no_ints(), chosen[i]));
                        else if (of > 1 && offset) n = minus(n, chosen[i]);
                        sums[i] = add_product(sums[i], times(own, x[i].scale[u]), n);
                    }
                }
            }
        }
        UNROLL for (int i = 0; i < tokens; i++) store(out + COMPOT_TILE * i + ROWS * part, sums[i]);
    }
}

#define ONE(bits, of, fine)                                                                                           \
    static void KERNEL(tile_##bits##_##of##_##fine)(const compot_tiles *t, const uint8_t *tile,                       \
                                                    const compot_activation *x, int tokens, float *out) {             \
        if (tokens == MOST_TOKENS) {                                                                                  \
            KERNEL(tile)(t, tile, x, bits, of, fine, MOST_TOKENS, out);                                               \
            return;                                                                                                   \
        }                                                                                                             \
        for (int i = 0; i < tokens; i++) KERNEL(tile)(t, tile, x + i, bits, of, fine, 1, out + COMPOT_TILE * i);             \
    }
#define EACH(bits) ONE(bits, 1, 0) ONE(bits, 1, 1) ONE(bits, 4, 0) ONE(bits, 4, 1) ONE(bits, 8, 0) ONE(bits, 8, 1)
EACH(2) EACH(3) EACH(4) EACH(8)
#undef EACH
#undef ONE

/* `tokens` of 1 to MOST_TOKENS activations times one tile. */
static void KERNEL(product)(const compot_tiles *t, const uint8_t *tile, const compot_activation *x, int tokens, float *out) {
#define ONE(bits, of, fine)                                 \
    case (bits * 16 + of) * 2 + fine:                       \
        KERNEL(tile_##bits##_##of##_##fine)(t, tile, x, tokens, out); \
        return;
#define EACH(bits) ONE(bits, 1, 0) ONE(bits, 1, 1) ONE(bits, 4, 0) ONE(bits, 4, 1) ONE(bits, 8, 0) ONE(bits, 8, 1)
    switch ((t->bits * 16 + t->of) * 2 + t->fine) { EACH(2) EACH(3) EACH(4) EACH(8) }
#undef EACH
#undef ONE
}

#undef ROWS
#undef bytes_v
#undef ints_v
#undef floats_v
#undef KERNEL
#undef FUNCTION
#undef UNROLL
#undef PREFETCH
#undef AHEAD
#undef SIGNED
#undef load_bytes
#undef shifted
#undef placed
#undef either
#undef four
#undef eight
#undef true_values
#undef chosen_of
#undef no_ints
#undef whole
#undef dot
#undef dot_chosen
#undef minus
#undef no_floats
#undef halves
#undef times
#undef add_product
#undef store
#undef MOST_TOKENS
