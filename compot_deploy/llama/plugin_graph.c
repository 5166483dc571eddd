/* See plugin.h. This file: what llama.cpp's callback is answered, and the nodes that run in its threads. */
#include "plugin.h"

#include <stdio.h>
#include <stdlib.h>
#if !defined(_WIN32)
#include <sched.h>
#define GIVE_WAY() sched_yield()
#else
#define GIVE_WAY() ((void)0)
#endif

static void fail(plugin *p, const char *what, const char *name) {
    int none = 0;
    if (atomic_compare_exchange_strong(&p->failed, &none, 1))
        snprintf(p->error, sizeof p->error, "%s: %s", name, what);
}

static void wait_for_all(plugin *p, int threads) {
    if (threads == 1) return;
    int generation = atomic_load(&p->generation);
    if (atomic_fetch_add(&p->waiting, 1) == threads - 1) {
        atomic_store(&p->waiting, 0);
        atomic_fetch_add(&p->generation, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&p->generation, memory_order_acquire) == generation; spins++)
        if (spins > 4000) GIVE_WAY();
}

/* Share `ith` of `nth` of a range, in multiples of 16 rows. */
static int64_t share(int64_t total, int ith, int nth) {
    return ith >= nth ? total : (total * ith / nth) & ~(int64_t)15;
}

/* Rounds `tokens` vectors of n floats, `stride` bytes apart, divided among the threads by unit. */
static void round_all(const char *x, size_t stride, int64_t n, int64_t tokens, compot_activation *out, int ith, int nth) {
    int64_t units = compot_units(n), total = tokens * units, at = total * ith / nth, end = total * (ith + 1) / nth;
    while (at < end) {
        int64_t t = at / units, first = at % units, last = first + (end - at);
        if (last > units) last = units;
        compot_round((const float *)(const void *)(x + (size_t)t * stride), n, first, last, &out[t]);
        at += last - first;
    }
}

/* One token is rounded by every thread for itself, which is quicker than to wait for the others. */
static compot_activation *rounded_for(compot_activation *all, const plugin *p, const char *x, size_t stride, int64_t n,
                                      int64_t tokens, int ith, int nth) {
    if (tokens == 1) {
        compot_activation *own = all + p->max_tokens + ith;
        round_all(x, stride, n, 1, own, 0, 1);
        return own;
    }
    round_all(x, stride, n, tokens, all, ith, nth);
    return all;
}

static void multiply(const plugin *p, const part *m, int ith, int nth, const compot_activation *x, int64_t tokens, float *y,
                     int64_t stride, int add) {
    int64_t first = share(m->leaf.outputs, ith, nth), last = share(m->leaf.outputs, ith + 1, nth);
    if (!p->exact) {
        if (m->tiled) compot_multiply_tiles(&m->tiles, first, last, x, tokens, y, stride, add);
        else compot_multiply(&m->leaf, first, last, x, tokens, y, stride, add);
        return;
    }
    float *weights = p->weights + ith * p->longest;
    for (int64_t r = first; r < last; r++) {
        compot_row(&m->leaf, r, weights);
        for (int64_t t = 0; t < tokens; t++) {
            double sum = add ? y[t * stride + r] : 0.0;
            for (int64_t i = 0; i < m->leaf.inputs; i++) sum += (double)weights[i] * x[t].x[i];
            y[t * stride + r] = (float)sum;
        }
    }
}

static void run_linear(tensor *node, int ith, int nth, void *data) {
    const operation *op = data;
    linear *l = op->of;
    plugin *p = l->owner;
    const tensor *input = node->src[1];
    int64_t tokens = input->ne[1], stride = (int64_t)(node->nb[1] / sizeof(float)), own = tokens == 1 ? p->max_tokens + ith : 0;
    if (nth > p->threads) {
        if (ith == 0) fail(p, "more threads than the context was made for", l->name);
        return;
    }
    if (ith == 0) atomic_store(&p->ran, 1), atomic_fetch_add(&p->runs, 1);
    const compot_activation *x = p->x + own, *z[MAX_PAIRS] = {NULL};
    for (int i = 0; i < l->pairs; i++) z[i] = p->z[i] + own;
    if (!op->reuse) {
        if (!op->rounded) {
            x = rounded_for(p->x, p, input->data, input->nb[1], l->inputs, tokens, ith, nth);
            if (tokens > 1) wait_for_all(p, nth);
        }
        int64_t at = 0;
        for (int i = 0; i < l->pairs; i++) {
            multiply(p, &l->dictionaries[i], ith, nth, x, tokens, p->z_raw + at, l->atoms, 0);
            at += l->dictionaries[i].leaf.outputs;
        }
        if (l->pairs) {
            wait_for_all(p, nth);
            at = 0;
            for (int i = 0; i < l->pairs; i++) {
                rounded_for(p->z[i], p, (const char *)(p->z_raw + at), (size_t)l->atoms * sizeof(float),
                            l->codes[i].leaf.inputs, tokens, ith, nth);
                at += l->codes[i].leaf.inputs;
            }
            if (tokens > 1) wait_for_all(p, nth);
        }
    }
    int leaves = l->pairs ? l->pairs : 1;
    for (int i = 0; i < leaves; i++)
        multiply(p, &l->codes[i], ith, nth, l->pairs ? z[i] : x, tokens, node->data, stride, i > 0);
}

static void run_rows(tensor *node, int ith, int nth, void *data) {
    const operation *op = data;
    linear *l = op->of;
    plugin *p = l->owner;
    const int32_t *ids = node->src[1]->data;
    int64_t tokens = node->ne[1];
    if (ith == 0) atomic_store(&p->ran, 1), atomic_fetch_add(&p->runs, 1);
    for (int64_t t = tokens * ith / nth; t < tokens * (ith + 1) / nth; t++) {
        float *target = (float *)(void *)((char *)node->data + (size_t)t * node->nb[1]);
        if (ids[t] < 0 || ids[t] >= l->outputs) {
            memset(target, 0, sizeof(float) * (size_t)l->inputs);
            fail(p, "a token id outside the vocabulary", l->name);
        } else {
            compot_row(&l->codes[0].leaf, ids[t], target);
        }
    }
}

static linear *find(const plugin *p, const char *name) {
    int low = 0, high = p->count - 1;
    while (low <= high) {
        int middle = (low + high) / 2, order = strncmp(name, p->linears[middle].name, NAME);
        if (order == 0) return &p->linears[middle];
        if (order < 0) high = middle - 1;
        else low = middle + 1;
    }
    return NULL;
}

/* llama.cpp gives this way of loading every optional scale and bias; a node that multiplies with one or adds zero in
 * place changes nothing, and costs a barrier of all threads. What adds ones or multiplies with zeros does. */
static bool is_neutral(const plugin *p, const tensor *node) {
    const tensor *value = node->src[0], *by = node->src[1];
    if ((node->op != p->op_add && node->op != p->op_mul) || !value || !by || node->data != value->data ||
        node->type != TYPE_F32 || value->type != TYPE_F32)
        return false;
    for (int d = 0; d < 4; d++)
        if (node->ne[d] != value->ne[d] || node->nb[d] != value->nb[d]) return false;
    const char *kind = strrchr(by->name, '.');
    if (!kind || strcmp(kind, node->op == p->op_add ? ".bias" : ".scale")) return false;
    return p->neutral_count && bsearch(by->name, p->neutral, (size_t)p->neutral_count, NAME, compare_names);
}

static void replace(tensor *node, const plugin *p, void (*function)(tensor *, int, int, void *), operation *op) {
    custom_params params = {function, -1, op};
    memset(node->op_params, 0, sizeof node->op_params);
    memcpy(node->op_params, &params, sizeof params);
    node->op = p->op_custom;
}

/* llama.cpp's cb_eval: never wants to see a node's data, so the graph is computed in one piece. */
COMPOT_API bool compot_plugin_callback(tensor *node, bool ask, void *data) {
    plugin *p = data;
    if (!ask) return true;
    if (is_neutral(p, node)) {
        node->op = OP_NONE;
        return false;
    }
    if (node->op != p->op_mul_mat && node->op != p->op_get_rows) return false;
    linear *l = node->src[0] ? find(p, node->src[0]->name) : NULL;
    if (!l) return false;
    const tensor *input = node->src[1];
    if (node->op == p->op_get_rows) {
        if (l->pairs || input->type != TYPE_I32 || node->type != TYPE_F32 || node->nb[0] != sizeof(float) ||
            node->ne[0] != l->inputs || node->ne[2] != 1 || node->ne[3] != 1 || input->nb[0] != sizeof(int32_t))
            fail(p, "llama.cpp reads the embedding in a way that is not handled", l->name);
        else replace(node, p, run_rows, &l->fresh);
        return false;
    }
    if (l->bundle == ROWS_ONLY || input->type != TYPE_F32 || node->type != TYPE_F32 || input->nb[0] != sizeof(float) ||
        node->nb[0] != sizeof(float) || input->ne[0] != l->inputs || node->ne[0] != l->outputs || input->ne[2] != 1 ||
        input->ne[3] != 1 || input->nb[1] % sizeof(float) || node->nb[1] % sizeof(float)) {
        fail(p, "llama.cpp multiplies with the matrix in a shape that is not handled", l->name);
        return false;
    }
    if (input->ne[1] > p->max_tokens) {
        fail(p, "more tokens at a time than the context was made for", l->name);
        return false;
    }
    /* A new graph, or a new evaluation: its first question comes after something ran, or repeats a matrix. */
    if (atomic_exchange(&p->ran, 0) || l->asked == p->epoch) {
        p->epoch++;
        p->last_bundle = -1;
        p->last_input = NULL;
    }
    l->asked = p->epoch;
    bool rounded = input == p->last_input, reuse = rounded && l->bundle >= 0 && l->bundle == p->last_bundle;
    p->last_bundle = l->bundle;
    p->last_input = input;
    replace(node, p, run_linear, reuse ? &l->again : rounded ? &l->rounded : &l->fresh);
    return false;
}
