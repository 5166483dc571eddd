/* Every kernel against a slow product, without Python: for sanitizers and for other processors under an emulator.
 * What is made of integers has the same bits as with the portable kernels.
 *
 * Leaves are allocated with exactly their bytes, so a read past the end is a read outside of an allocation.
 * Built and run by check_kernels.sh. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;
static uint32_t draw(void) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}
static float uniform(void) { return (float)(draw() % 20001) / 10000.0f - 1.0f; }

static int64_t row_bytes(int kind, int bits, int of, int64_t group, int64_t inputs) {
    int64_t units = (inputs + 63) / 64;
    if (kind == COMPOT_F32) return 4 * inputs;
    if (kind == COMPOT_F16 || kind == COMPOT_BF16) return 2 * inputs;
    if (kind == COMPOT_Q4_0) return (inputs + 31) / 32 * 18;
    if (kind == COMPOT_Q8_0) return (inputs + 31) / 32 * 34;
    int slots = of == 1 ? 64 : 32, positions = of == 1 ? 0 : of == 4 ? 2 : 3;
    return 2 * ((inputs + group - 1) / group) + units * slots * (bits + positions) / 8;
}

static int checked = 0, isa = COMPOT_SCALAR;

static void put(uint8_t *plane, int slots, int bits, int slot, int value) {
    int bytes = slots * bits / 8, shift = slot / bytes * bits;
    uint8_t *byte = plane + slot % bytes;
    *byte = (uint8_t)((*byte & ~(((1 << bits) - 1) << shift)) | value << shift);
}

/* Ascending positions in every group of every record of a row. */
static void legal_positions(uint8_t *record, int64_t units, int bits, int of) {
    int values = 32 * bits / 8, stride = values + (of == 4 ? 8 : 12), kept = of / 2;
    for (int64_t u = 0; u < units; u++, record += stride)
        for (int group = 0; group < 32 / kept; group++) {
            int slot = 0;
            for (int place = 0; place < of && slot < kept; place++) {
                int must = of - place == kept - slot;
                if (!must && (draw() & 1)) continue;
                put(record + values, 32, 2, group * kept + slot, place & 3);
                if (of == 8) put(record + values + 8, 32, 1, group * kept + slot, place >> 2);
                slot++;
            }
        }
}

/* Random bytes are legal in every kind, but for scales, which are set to small halves. */
static int check(int kind, int bits, int of, int group, int64_t inputs, int64_t outputs, int64_t tokens, int extreme) {
    compot_leaf leaf = {kind, bits, of, group, inputs, outputs, 0, 0, NULL};
    leaf.row_bytes = kind == COMPOT_COLUMNS ? outputs : row_bytes(kind, bits, of, group, inputs);
    leaf.nbytes = kind == COMPOT_COLUMNS ? outputs * (2 + inputs) : leaf.row_bytes * outputs;
    uint8_t *data = malloc((size_t)leaf.nbytes);
    float *x = malloc(sizeof(float) * (size_t)(tokens * inputs)), *y = malloc(sizeof(float) * (size_t)(tokens * outputs));
    float *row = malloc(sizeof(float) * (size_t)inputs);
    double *seen = malloc(sizeof(double) * (size_t)(tokens * inputs));
    for (int64_t i = 0; i < leaf.nbytes; i++) data[i] = extreme ? (draw() & 1 ? 0xff : 0x00) : (uint8_t)draw();
    for (int64_t r = 0; r < outputs; r++) {
        int64_t scales = kind == COMPOT_PLANES ? (inputs + group - 1) / group
                         : kind == COMPOT_Q4_0 || kind == COMPOT_Q8_0 ? (inputs + 31) / 32 : 0;
        for (int64_t g = 0; g < scales; g++) {
            int64_t at = r * leaf.row_bytes + (kind == COMPOT_PLANES ? 2 * g : g * (kind == COMPOT_Q4_0 ? 18 : 34));
            uint16_t half = (uint16_t)(0x2000 + draw() % 0x800);
            memcpy(data + at, &half, 2);
        }
        for (int64_t i = 0; i < inputs && kind <= COMPOT_BF16; i++) {
            uint16_t half = (uint16_t)(kind == COMPOT_F16 ? 0x2000 + draw() % 0x800 : 0x3c00 + draw() % 0x100);
            float full = uniform();
            if (kind == COMPOT_F32) memcpy(data + r * leaf.row_bytes + 4 * i, &full, 4);
            else memcpy(data + r * leaf.row_bytes + 2 * i, &half, 2);
        }
        if (kind == COMPOT_PLANES && of > 1)
            legal_positions(data + r * leaf.row_bytes + 2 * scales, (inputs + 63) / 64, bits, of);
        if (kind == COMPOT_COLUMNS) {
            uint16_t half = 0x2400;
            memcpy(data + 2 * r, &half, 2);
        }
    }
    leaf.data = data;
    for (int64_t i = 0; i < tokens * inputs; i++) x[i] = extreme ? (draw() & 1 ? 3.0f : -3.0f) : uniform();
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t start = 0; start < inputs; start += 64) {
            int64_t end = start + 64 < inputs ? start + 64 : inputs;
            float peak = 0;
            for (int64_t i = start; i < end; i++) peak = fmaxf(peak, fabsf(x[t * inputs + i]));
            for (int64_t i = start; i < end; i++) {
                float v = x[t * inputs + i];
                seen[t * inputs + i] = kind == COMPOT_COLUMNS || kind <= COMPOT_BF16
                                           ? v : peak > 0 ? (double)nearbyintf(v * (127 / peak)) * (peak / 127) : 0;
            }
        }
    int wrong = compot_product(&leaf, x, tokens, y);
    if (!wrong && isa != COMPOT_SCALAR && kind > COMPOT_BF16 && !extreme && tokens > 1) {
        float *portable = malloc(sizeof(float) * (size_t)(tokens * outputs));
        compot_use(COMPOT_SCALAR);
        wrong = compot_product(&leaf, x, tokens, portable);
        if (!wrong && memcmp(portable, y, sizeof(float) * (size_t)(tokens * outputs))) wrong = 101;
        free(portable);
        compot_use(isa);
    }
    for (int64_t r = 0; r < outputs && !wrong; r++) {
        compot_row(&leaf, r, row);
        for (int64_t t = 0; t < tokens; t++) {
            double sum = 0, size = 0;
            /* stored values carry an offset, and float32 rounds the sum with it; scales here are below 1/32 */
            double offset = kind == COMPOT_PLANES && bits < 8 ? (1 << (bits - 1)) / 32.0 : kind == COMPOT_Q4_0 ? 0.25 : 0;
            for (int64_t i = 0; i < inputs; i++) {
                double v = seen[t * inputs + i];
                sum += row[i] * v, size += (fabs(row[i]) + offset) * fabs(v);
            }
            if (!(fabs(y[t * outputs + r] - sum) <= 1e-6 * size + 1e-30)) wrong = 100;
        }
    }
    free(data), free(x), free(y), free(row), free(seen);
    checked++;
    if (wrong) printf("kind %d bits %d of %d group %d: %lld x %lld, %lld tokens: failed (%d)\n", kind, bits, of, group,
                      (long long)inputs, (long long)outputs, (long long)tokens, wrong);
    return wrong;
}

int main(void) {
    static const int64_t widths[] = {1, 8, 31, 32, 33, 63, 64, 65, 96, 127, 130, 192, 257, 640, 4160};
    int failures = 0, best = compot_best();
    for (isa = 0; isa < COMPOT_ISAS; isa++) {
        if (compot_use(isa) != isa) continue;
        for (unsigned i = 0; i < sizeof widths / sizeof *widths; i++)
            for (int64_t tokens = 1; tokens <= 5; tokens += 4)
                for (int extreme = 0; extreme < 2; extreme++) {
                    int64_t inputs = widths[i];
                    for (int bits = 2; bits <= 8; bits++)
                        for (int of = 1; of <= 8 && (bits < 5 || bits == 8); of += of == 1 ? 3 : 4)
                            for (int group = 32; group <= 128; group += 32)
                                failures += !!check(COMPOT_PLANES, bits, of, group, inputs, 3, tokens, extreme);
                    for (int kind = COMPOT_F32; kind <= COMPOT_Q8_0; kind++)
                        failures += !!check(kind, 0, 1, 64, inputs, 3, tokens, extreme);
                    if (inputs <= 32) failures += !!check(COMPOT_COLUMNS, 8, 1, 64, inputs, 131, tokens, extreme);
                }
        printf("instruction set %d: %d products, %d failures\n", isa, checked, failures);
        checked = 0;
    }
    compot_use(best);
    return failures != 0;
}
