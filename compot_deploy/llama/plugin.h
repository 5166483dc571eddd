/* Factorized matrices inside an unmodified llama.cpp.
 *
 * llama.cpp asks a public callback (cb_eval) about every node of its graph before it computes it. A MUL_MAT whose
 * weight is one of ours becomes a CUSTOM node that calls run_linear from llama.cpp's own threads; a GET_ROWS on an
 * embedding of ours becomes one that calls run_rows. Nothing here is compiled against llama.cpp: the layout of
 * ggml_tensor below is compared with the library when it is loaded (library.py), and refused if it differs.
 *
 * plugin.c takes the matrices before anything runs; plugin_graph.c answers the callback and runs the nodes. */
#ifndef COMPOT_PLUGIN_H
#define COMPOT_PLUGIN_H

#include "kernels.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

enum { ROWS_ONLY = -2 };
enum { NAME = 64, MAX_PAIRS = 4, MAX_SOURCES = 10, TYPE_F32 = 0, TYPE_I32 = 26, OP_NONE = 0 };

typedef struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[MAX_SOURCES];
    struct tensor *view_src;
    size_t view_offs;
    void *data;
    char name[NAME];
    void *extra;
    char padding[8];
} tensor;

_Static_assert(sizeof(void *) == 8, "llama.cpp's 64-bit layout is the only one that is checked");
_Static_assert(offsetof(tensor, op) == 80 && offsetof(tensor, src) == 152, "layout of ggml_tensor");
_Static_assert(offsetof(tensor, data) == 248 && offsetof(tensor, name) == 256, "layout of ggml_tensor");

/* What ggml keeps in op_params of a CUSTOM node. */
typedef struct {
    void (*function)(tensor *, int, int, void *);
    int32_t tasks;
    void *data;
} custom_params;

typedef struct plugin plugin;
typedef struct linear linear;

/* A matrix of integers is multiplied from its tiles, others from the file. */
typedef struct {
    compot_leaf leaf;
    compot_tiles tiles;
    bool tiled;
} part;

/* Tiles of a leaf: made once, also when several matrices share it. */
typedef struct {
    const uint8_t *source;
    void *memory;
    const uint8_t *data;
} store;

typedef struct {
    linear *of;
    bool rounded; /* the node before rounded the same input */
    bool reuse;   /* and multiplied it with the same dictionaries */
} operation;

struct linear {
    char name[NAME];
    plugin *owner;
    int pairs;         /* 0: one plain leaf, in codes[0] */
    int32_t bundle;    /* linears with one bundle have the same dictionaries; -1 shares nothing, ROWS_ONLY: see add */
    int64_t inputs, outputs, atoms;
    part dictionaries[MAX_PAIRS], codes[MAX_PAIRS];
    uint64_t asked;
    operation fresh, rounded, again;
};

struct plugin {
    int op_mul_mat, op_get_rows, op_custom, op_add, op_mul;
    int capacity, count, threads, stored, neutral_count;
    char (*neutral)[NAME];
    store *stores;
    int64_t tile_bytes;
    bool exact; /* activations as they are, sums in double: slow, for comparisons */
    float *weights; /* then: one row of each thread */
    int64_t max_tokens, wide, atoms, longest; /* widest input, and most atoms of one linear */
    linear *linears;
    /* scratch, shared by all nodes: they run one after the other */
    compot_activation *x, *z[MAX_PAIRS]; /* of max_tokens tokens, and then one of each thread */
    float *z_raw, *floats;
    int8_t *bytes;
    /* state of the graph that is being asked about */
    uint64_t epoch;
    int32_t last_bundle;
    const tensor *last_input;
    atomic_int ran, failed;
    atomic_llong runs;
    char error[256];
    /* barrier of the threads inside one node */
    atomic_int waiting, generation;
};

static inline int compare_names(const void *a, const void *b) { return strncmp(a, b, NAME); }

#endif
