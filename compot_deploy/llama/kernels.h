/* Matrix times activations, for weights kept in the bytes of a GGUF file.
 *
 * A leaf is a matrix (inputs, outputs) in one of the kinds below; docs/gguf-layout.md has every byte. Activations
 * are rounded to int8, one float scale per unit of 64 inputs; products are exact int32, sums are float32 in an
 * order that depends on the row alone, so the number of threads never changes a bit of the result.
 */
#ifndef COMPOT_KERNELS_H
#define COMPOT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define COMPOT_API __declspec(dllexport)
#else
#define COMPOT_API __attribute__((visibility("default")))
#endif

enum { COMPOT_UNIT = 64 };

enum compot_kind { COMPOT_F32, COMPOT_F16, COMPOT_BF16, COMPOT_Q4_0, COMPOT_Q8_0, COMPOT_PLANES, COMPOT_COLUMNS };

/* Instruction sets, in the order in which they are preferred. */
enum compot_isa { COMPOT_SCALAR, COMPOT_AVX2, COMPOT_AVX512, COMPOT_NEON, COMPOT_ISAS };

typedef struct {
    int32_t kind;    /* enum compot_kind */
    int32_t bits;    /* of planes and columns: 2, 3, 4 or 8 */
    int32_t of;      /* of planes: 1 dense, 4 for 2:4, 8 for 4:8 */
    int32_t group;   /* of planes: inputs per scale, a multiple of 32, or at least the inputs */
    int64_t inputs;  /* without padding */
    int64_t outputs; /* rows of the payload that are results */
    int64_t row_bytes;
    int64_t nbytes;
    const uint8_t *data;
} compot_leaf;

/* Activations of one token, rounded. Halves are 32 inputs. */
typedef struct {
    int8_t *q;     /* units * 64; zero beyond the inputs */
    float *scale;  /* units */
    int32_t *sums; /* 2 * units: of q, per half; undoes the offset of stored values */
    float *x;      /* units * 64 floats; zero beyond the inputs */
} compot_activation;

/* A leaf of integers as the kernels read it: 16 rows side by side, so that a lane is a row and nothing is summed
 * across lanes. A tile is
 *   head        half-precision scales: 16 per group; 16 per half when groups are not whole units (`fine`)
 *   per unit    planes of values, then of positions, like those of the file. Vector j, 64 bytes, is slots 4j to
 *               4j+3 of each row in turn; a plane of b bits keeps vectors 8i/b to 8(i+1)/b - 1 in its i-th 64 bytes.
 * Values are unsigned, 2^(bits-1) too large; rows beyond the outputs are zero. */
typedef struct {
    int32_t bits, of, fine;
    int32_t per_scale; /* units per group; 0 when fine */
    int64_t units, outputs, unit_bytes, head, tile_bytes;
    const uint8_t *data;
} compot_tiles;

enum { COMPOT_TILE = 16 };

/* Floats and bytes that the activations of one token take, per unit. */
enum { COMPOT_UNIT_FLOATS = 64 + 3, COMPOT_UNIT_BYTES = 64 };

static inline void compot_activation_at(compot_activation *a, int64_t units, float *floats, int8_t *bytes) {
    a->x = floats, a->scale = floats + 64 * units, a->sums = (int32_t *)(void *)(floats + 65 * units), a->q = bytes;
}

static inline int64_t compot_units(int64_t inputs) { return (inputs + COMPOT_UNIT - 1) / COMPOT_UNIT; }

/* Rounds units [first, last) of n inputs. A unit with an infinity or a NaN gets the scale NaN, and so does
 * everything computed from it; a unit below 1e-30 becomes zero. */
void compot_round(const float *x, int64_t n, int64_t first, int64_t last, compot_activation *out);

/* Describes the tiles of a leaf and returns their bytes; 0 for kinds that are multiplied as they are. */
int64_t compot_tiles_of(const compot_leaf *leaf, compot_tiles *tiles);

/* Rearranges a leaf into `out`, which the tiles then point to. */
void compot_tile(const compot_leaf *leaf, compot_tiles *tiles, uint8_t *out);

/* Rows [first, last) times `tokens` activations: y[t * stride + row], added to y when `add` is set. `first` is a
 * multiple of COMPOT_TILE. A row's result for a token depends on nothing else, and is the same in all instruction sets. */
void compot_multiply_tiles(const compot_tiles *tiles, int64_t first, int64_t last, const compot_activation *x,
                           int64_t tokens, float *y, int64_t stride, int add);

/* The same for leaves of floats and columns. */
void compot_multiply(const compot_leaf *leaf, int64_t first, int64_t last, const compot_activation *x, int64_t tokens,
                     float *y, int64_t stride, int add);

/* The values of one row as float32. */
void compot_row(const compot_leaf *leaf, int64_t row, float *out);

/* 0, or a number that says what about a leaf is impossible; a leaf that passes is read inside its nbytes. */
COMPOT_API int compot_check(const compot_leaf *leaf);

/* Best instruction set of this machine; compot_use returns the one in force after asking for another. */
COMPOT_API int compot_best(void);
COMPOT_API int compot_use(int isa);

/* One whole product, single-threaded, for tests: y (tokens, outputs) = x (tokens, inputs) times the leaf. */
COMPOT_API int compot_product(const compot_leaf *leaf, const float *x, int64_t tokens, float *y);

#endif
