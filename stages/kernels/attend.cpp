// Attention of packed texts, forward and backward, in float32: S prompts of up to C tokens, each with G answers of up to L tokens.
// An answer's token looks at its prompt and at its own answer's tokens up to itself. `attention.py` calls it and says the rest.
//
// A task is a prompt and a head. It packs the keys and values that its rows look at so that `tile` can multiply them, then takes
// six rows of queries at a time: their scores lie side by side, short enough to stay near. Every sum is made by one thread in an
// order that depends on the shapes alone. Keys and values of K heads serve H / K query heads each; the gradient comes out apart
// for each of the H, so that no two tasks write the same place.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "threads.h"

extern "C" {

struct Attention {
    std::int64_t prompts, answers, length, read, queries, heads, size, threads;  // S, G, L, C, H, K, d
    float scale;
    const std::int64_t *prompt_length;  // (S), each at most C
    const float *query, *key, *value;  // (S, G, L, H, d); (S, G, L, K, d)
    const float *prompt_key, *prompt_value;  // (S, C, K, d)
    float *out, *total;  // (S, G, L, H, d); (S, G, L, H) log-sum-exps
    const float *gradient;  // as out
    float *to_query, *to_key, *to_value;  // (S, G, L, H, d)
    float *to_prompt_key, *to_prompt_value;  // (S, C, H, d)
    float *scratch;  // threads × attention_scratch
};
}

namespace {

std::int64_t room(const Attention *a) { return (a->read + a->length + BLOCK - 1) / BLOCK * BLOCK; }

// 8 × 8 numbers, rows `stride` apart, into columns 16 apart.
inline void transposed(const float *from, std::int64_t stride, float *into) {
#ifdef R1_AVX
    __m256 r[8], t[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(from + k * stride);
    for (int k = 0; k < 8; k += 2) t[k] = _mm256_unpacklo_ps(r[k], r[k + 1]), t[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
    for (int k = 0; k < 8; k += 4)
        for (int half = 0; half < 2; half++) {
            r[k + 2 * half] = _mm256_shuffle_ps(t[k + half], t[k + half + 2], 0x44);
            r[k + 2 * half + 1] = _mm256_shuffle_ps(t[k + half], t[k + half + 2], 0xEE);
        }
    for (int k = 0; k < 4; k++) {
        _mm256_storeu_ps(into + k * BLOCK, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
        _mm256_storeu_ps(into + (k + 4) * BLOCK, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
    }
#else
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 8; i++) into[i * BLOCK + k] = from[k * stride + i];
#endif
}

// Columns of a product: [block of 16 keys][size][16].
void pack_columns(const float *from, std::int64_t stride, std::int64_t count, std::int64_t size, std::int64_t first, float *into) {
    for (std::int64_t j = 0; j < count;) {
        const std::int64_t place = first + j;
        float *to = into + place / BLOCK * size * BLOCK + place % BLOCK;
        if (place % LANES == 0 && j + LANES <= count) {
            for (std::int64_t i = 0; i < size; i += LANES) transposed(from + j * stride + i, stride, to + i * BLOCK);
            j += LANES;
        } else {
            for (std::int64_t i = 0; i < size; i++) to[i * BLOCK] = from[j * stride + i];
            j++;
        }
    }
}

// Rows of a product: [block of 16 of `size`][room][16].
void pack_rows(const float *from, std::int64_t stride, std::int64_t count, std::int64_t size, std::int64_t first, std::int64_t room,
               float *into) {
    for (std::int64_t j = 0; j < count; j++)
        for (std::int64_t block = 0; block < size / BLOCK; block++)
            std::memcpy(into + (block * room + first + j) * BLOCK, from + j * stride + block * BLOCK, BLOCK * sizeof(float));
}

// (rows, room) of (rows, size) against packed columns, for the first `limit` of them.
void against(int rows, const float *some, std::int64_t size, const float *columns, std::int64_t limit, std::int64_t room, float *into) {
    for (std::int64_t block = 0; block * BLOCK < limit; block++) {
        Lanes sums[PANEL][2];
        tile<2>(rows, some, size, size, columns + block * size * BLOCK, sums);
        for (int m = 0; m < rows; m++)
            for (int half = 0; half < 2; half++) store(into + m * room + block * BLOCK + half * LANES, sums[m][half]);
    }
}

// Calls take(row, first of 16 numbers, two vectors) for every part of (rows, limit) against packed rows.
template <class Take>
void mixed(int rows, const float *weights, std::int64_t room, std::int64_t limit, const float *values, std::int64_t size, Take take) {
    for (std::int64_t block = 0; block < size / BLOCK; block++) {
        Lanes sums[PANEL][2];
        tile<2>(rows, weights, room, limit, values + block * room * BLOCK, sums);
        for (int m = 0; m < rows; m++) take(m, block * BLOCK, sums[m]);
    }
}

// into[j] += Σ over rows of weights[row][j] × some[row], for `limit` places j of `size` numbers.
template <int M>
void spread(const float *weights, std::int64_t room, std::int64_t limit, const float *some, std::int64_t size, float *into) {
    for (std::int64_t i = 0; i < size; i += BLOCK) {
        Lanes low[M], high[M];
        for (int m = 0; m < M; m++) low[m] = load(some + m * size + i), high[m] = load(some + m * size + i + LANES);
        for (std::int64_t j = 0; j < limit; j++) {
            float *to = into + j * size + i;
            Lanes a = load(to), b = load(to + LANES);
            for (int m = 0; m < M; m++) {
                const Lanes w = all(weights[m * room + j]);
                a = fused(w, low[m], a);
                b = fused(w, high[m], b);
            }
            store(to, a);
            store(to + LANES, b);
        }
    }
}

void spread(int rows, const float *weights, std::int64_t room, std::int64_t limit, const float *some, std::int64_t size, float *into) {
    switch (rows) {
    case 6: return spread<6>(weights, room, limit, some, size, into);
    case 5: return spread<5>(weights, room, limit, some, size, into);
    case 4: return spread<4>(weights, room, limit, some, size, into);
    case 3: return spread<3>(weights, room, limit, some, size, into);
    case 2: return spread<2>(weights, room, limit, some, size, into);
    default: return spread<1>(weights, room, limit, some, size, into);
    }
}

// What a task works on: prompt `s`, head `h`, and where its parts lie.
struct Task {
    const Attention *a;
    std::int64_t s, h, held, before;

    Task(const Attention *a, std::int64_t number)
        : a(a), s(number / a->queries), h(number % a->queries), held(h / (a->queries / a->heads)), before(a->prompt_length[s]) {}
    std::int64_t own(std::int64_t g, std::int64_t heads, std::int64_t head) const {
        return (((s * a->answers + g) * a->length) * heads + head) * a->size;
    }
    std::int64_t shared(std::int64_t heads, std::int64_t head) const { return (s * a->read * heads + head) * a->size; }
};

// Rows of one head, `stride` apart, side by side and times `factor`.
void gathered(const float *from, std::int64_t stride, int rows, std::int64_t size, float factor, float *into) {
    for (int m = 0; m < rows; m++)
        for (std::int64_t i = 0; i < size; i += LANES) store(into + m * size + i, load(from + m * stride + i) * factor);
}

void scattered(const float *from, std::int64_t count, std::int64_t size, float *to, std::int64_t stride) {
    for (std::int64_t j = 0; j < count; j++) std::memcpy(to + j * stride, from + j * size, size * sizeof(float));
}

void forward(const Task &task, float *scratch) {
    const Attention *a = task.a;
    const std::int64_t size = a->size, n = room(a), asked = a->queries * size, held = a->heads * size;
    float *columns = scratch, *values = columns + n * size, *q = values + n * size, *weights = q + PANEL * size;
    pack_columns(a->prompt_key + task.shared(a->heads, task.held), held, task.before, size, 0, columns);
    pack_rows(a->prompt_value + task.shared(a->heads, task.held), held, task.before, size, 0, n, values);
    for (std::int64_t g = 0; g < a->answers; g++) {
        pack_columns(a->key + task.own(g, a->heads, task.held), held, a->length, size, task.before, columns);
        pack_rows(a->value + task.own(g, a->heads, task.held), held, a->length, size, task.before, n, values);
        for (std::int64_t first = 0; first < a->length; first += PANEL) {
            const int rows = static_cast<int>(std::min<std::int64_t>(PANEL, a->length - first));
            const std::int64_t limit = task.before + first + rows, start = task.own(g, a->queries, task.h) + first * asked;
            gathered(a->query + start, asked, rows, size, a->scale, q);
            against(rows, q, size, columns, limit, n, weights);
            float shares[PANEL];
            for (int m = 0; m < rows; m++) {
                float *row = weights + m * n;
                const std::int64_t seen = task.before + first + m + 1;
                for (std::int64_t j = seen; j < (limit + BLOCK - 1) / BLOCK * BLOCK; j++) row[j] = -INFINITY;
                Lanes tops = load(row);
                for (std::int64_t j = LANES; j < seen; j += LANES) {
                    const Lanes v = load(row + j);
                    tops = v > tops ? v : tops;
                }
                float top = tops[0];
                for (int lane = 1; lane < LANES; lane++) top = std::max(top, tops[lane]);
                Lanes sums = {};
                for (std::int64_t j = 0; j < limit; j += LANES) {
                    const Lanes shifted = load(row + j) - top;
                    const Lanes weight = shifted > all(-87.0f) ? exponential(shifted) : Lanes{};
                    store(row + j, weight);
                    sums += weight;
                }
                const float total = sum(sums);
                shares[m] = 1.0f / total;
                a->total[((task.s * a->answers + g) * a->length + first + m) * a->queries + task.h] = top + std::log(total);
            }
            mixed(rows, weights, n, limit, values, size, [&](int m, std::int64_t i, const Lanes(&sums)[2]) {
                float *to = a->out + start + m * asked + i;
                store(to, sums[0] * shares[m]);
                store(to + LANES, sums[1] * shares[m]);
            });
        }
    }
}

void backward(const Task &task, float *scratch) {
    const Attention *a = task.a;
    const std::int64_t size = a->size, n = room(a), asked = a->queries * size, held = a->heads * size;
    float *columns = scratch, *keys = columns + n * size, *values = keys + n * size, *to_keys = values + n * size;
    float *to_values = to_keys + n * size, *q = to_values + n * size, *g_rows = q + PANEL * size;
    float *weights = g_rows + PANEL * size, *slopes = weights + PANEL * n;
    const float *prompt_key = a->prompt_key + task.shared(a->heads, task.held);
    pack_columns(prompt_key, held, task.before, size, 0, columns);
    pack_rows(prompt_key, held, task.before, size, 0, n, keys);
    pack_columns(a->prompt_value + task.shared(a->heads, task.held), held, task.before, size, 0, values);
    std::fill_n(to_keys, task.before * size, 0.0f);
    std::fill_n(to_values, task.before * size, 0.0f);
    for (std::int64_t g = 0; g < a->answers; g++) {
        const float *key = a->key + task.own(g, a->heads, task.held);
        pack_columns(key, held, a->length, size, task.before, columns);
        pack_rows(key, held, a->length, size, task.before, n, keys);
        pack_columns(a->value + task.own(g, a->heads, task.held), held, a->length, size, task.before, values);
        std::fill_n(to_keys + task.before * size, a->length * size, 0.0f);
        std::fill_n(to_values + task.before * size, a->length * size, 0.0f);
        for (std::int64_t first = 0; first < a->length; first += PANEL) {
            const int rows = static_cast<int>(std::min<std::int64_t>(PANEL, a->length - first));
            const std::int64_t limit = task.before + first + rows, start = task.own(g, a->queries, task.h) + first * asked;
            gathered(a->query + start, asked, rows, size, a->scale, q);
            gathered(a->gradient + start, asked, rows, size, 1.0f, g_rows);
            against(rows, q, size, columns, limit, n, weights);
            against(rows, g_rows, size, values, limit, n, slopes);
            for (int m = 0; m < rows; m++) {
                Lanes products = {};  // Σ of gradient × output: what the softmax takes away from every slope
                const float *out = a->out + start + m * asked;
                for (std::int64_t i = 0; i < size; i += LANES) products = fused(load(out + i), load(g_rows + m * size + i), products);
                const float less = sum(products);
                const float total = a->total[((task.s * a->answers + g) * a->length + first + m) * a->queries + task.h];
                float *row = weights + m * n, *slope = slopes + m * n;
                const std::int64_t seen = task.before + first + m + 1;
                for (std::int64_t j = seen; j < (limit + BLOCK - 1) / BLOCK * BLOCK; j++) row[j] = -INFINITY, slope[j] = 0.0f;
                for (std::int64_t j = 0; j < limit; j += LANES) {
                    const Lanes shifted = load(row + j) - total;
                    const Lanes weight = shifted > all(-87.0f) ? exponential(shifted) : Lanes{};
                    store(row + j, weight);
                    store(slope + j, weight * (load(slope + j) - less));
                }
            }
            mixed(rows, slopes, n, limit, keys, size, [&](int m, std::int64_t i, const Lanes(&sums)[2]) {
                float *to = a->to_query + start + m * asked + i;
                store(to, sums[0] * a->scale);
                store(to + LANES, sums[1] * a->scale);
            });
            spread(rows, slopes, n, limit, q, size, to_keys);
            spread(rows, weights, n, limit, g_rows, size, to_values);
        }
        const std::int64_t own = task.own(g, a->queries, task.h);
        scattered(to_keys + task.before * size, a->length, size, a->to_key + own, asked);
        scattered(to_values + task.before * size, a->length, size, a->to_value + own, asked);
    }
    const std::int64_t shared = task.shared(a->queries, task.h);
    scattered(to_keys, task.before, size, a->to_prompt_key + shared, asked);
    scattered(to_values, task.before, size, a->to_prompt_value + shared, asked);
}

}  // namespace

extern "C" {

// Floats of scratch that a thread needs.
std::int64_t attention_scratch(const Attention *a) { return 5 * room(a) * a->size + 2 * PANEL * (a->size + room(a)); }

void attention_forward(const Attention *a) {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(a->threads))
    for (std::int64_t number = 0; number < a->prompts * a->queries; number++)
        forward(Task(a, number), a->scratch + omp_get_thread_num() * attention_scratch(a));
}

// Places behind a shorter prompt's end get no gradient: nothing is written there.
void attention_backward(const Attention *a) {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(a->threads))
    for (std::int64_t number = 0; number < a->prompts * a->queries; number++)
        backward(Task(a, number), a->scratch + omp_get_thread_num() * attention_scratch(a));
}
}
