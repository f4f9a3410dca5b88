// One decoding step of a Llama-like model in float32: R rows, each with one more token; and the draw of the next. `compiled.py`
// builds and calls them; `decoder.py` and `token_sampling.py` are the same in PyTorch, and say what the parts mean.
//
// A step reads every weight once, so for few rows it can be no faster than memory. What it gains over a library's products: no
// repacking of weights, nothing between two products but what is needed, one parallel region for the whole step.
//
// Activations lie in blocks of 16 rows of the batch: x[block][feature][16], the last block padded. A product walks over 6 rows of
// the weights at a time, whose 6 × 16 sums stay in registers. Every sum is made by one thread, in an order that depends on
// nothing but the model's shape: a row's numbers are the same whoever flies along and however many threads there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "threads.h"

namespace {

struct Linear {
    const float *weight, *bias;  // (out, in); (out) or null
};

struct Layer {
    const float *before_attention;  // (hidden) scale of the norm
    Linear q, k, v;
    const float *q_norm, *k_norm;  // (size) or null
    Linear o;
    const float *before_mlp;
    Linear gate, up, down;
};

inline void add_bias(const float *bias, std::int64_t first, int rows, Lanes (&sums)[PANEL][2]) {
    if (bias == nullptr) return;
    for (int m = 0; m < rows; m++) {
        sums[m][0] += bias[first + m];
        sums[m][1] += bias[first + m];
    }
}

// Calls take(first row of weights, rows, block, sums) for every tile of a product. To be called by all threads of the region.
template <class Take>
void product(Linear linear, std::int64_t out, std::int64_t in, const float *x, std::int64_t batch_rows, Take take) {
    const std::int64_t blocks = (batch_rows + BLOCK - 1) / BLOCK;
    const std::int64_t panels = (out + PANEL - 1) / PANEL;
    const std::int64_t together = blocks == 1 ? 1 : 4;  // panels that stay near while the blocks pass by
    const std::int64_t groups = (panels + together - 1) / together;
#pragma omp for schedule(static) nowait
    for (std::int64_t group = 0; group < groups; group++)
        for (std::int64_t block = 0; block < blocks; block++)
            for (std::int64_t panel = group * together; panel < std::min(panels, (group + 1) * together); panel++) {
                const std::int64_t first = panel * PANEL;
                const int rows = static_cast<int>(std::min<std::int64_t>(PANEL, out - first));
                Lanes sums[PANEL][2];
                if (batch_rows - block * BLOCK <= LANES)  // half of a block is enough
                    tile<1>(rows, linear.weight + first * in, in, in, x + block * in * BLOCK, sums);
                else
                    tile<2>(rows, linear.weight + first * in, in, in, x + block * in * BLOCK, sums);
                add_bias(linear.bias, first, rows, sums);
                take(first, rows, block, sums);
            }
}

// Root mean square normalisation of every row; each thread makes a copy of its own, which is cheaper than to wait.
void normed(const float *scale, float epsilon, std::int64_t width, std::int64_t blocks, const float *x, float *into) {
    for (std::int64_t block = 0; block < blocks; block++) {
        const float *from = x + block * width * BLOCK;
        float *to = into + block * width * BLOCK;
        Lanes total[2] = {};
        for (std::int64_t start = 0; start < width; start += DEPTH) {
            Lanes part[2] = {};
            for (std::int64_t i = start; i < std::min<std::int64_t>(start + DEPTH, width); i++)
                for (int half = 0; half < 2; half++) {
                    const Lanes v = load(from + i * BLOCK + half * LANES);
                    part[half] += v * v;
                }
            total[0] += part[0];
            total[1] += part[1];
        }
        for (int half = 0; half < 2; half++) {
            Lanes factor;
            for (int lane = 0; lane < LANES; lane++)
                factor[lane] = 1.0f / std::sqrt(total[half][lane] / static_cast<float>(width) + epsilon);
            for (std::int64_t i = 0; i < width; i++) {
                const std::int64_t place = i * BLOCK + half * LANES;
                store(to + place, load(from + place) * factor * scale[i]);
            }
        }
    }
}

// The same of one head.
void normed_head(const float *scale, float epsilon, std::int64_t size, float *head) {
    if (scale == nullptr) return;
    Lanes squares = {};
    for (std::int64_t i = 0; i < size; i += LANES) squares += load(head + i) * load(head + i);
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
    for (std::int64_t i = 0; i < size; i += LANES) store(head + i, load(head + i) * factor * load(scale + i));
}

// Rotary position embedding; the table's sines carry the sign of the half.
void turned(const float *cosines, const float *sines, std::int64_t size, float *head) {
    const std::int64_t half = size / 2;
    for (std::int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] + b * sines[i];
        head[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

// Each lane the sum of one of eight vectors.
inline Lanes sums_of(const Lanes (&v)[8]) {
#ifdef R1_AVX
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    return Lanes{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3]), sum(v[4]), sum(v[5]), sum(v[6]), sum(v[7])};
#endif
}

// A query against `count` keys that lie one behind the other; eight at once, so that none waits for its own last product.
void scored(const float *query, const float *keys, std::int64_t count, std::int64_t size, float *scores) {
    std::int64_t t = 0;
    for (; t + 8 <= count; t += 8) {
        Lanes total[8] = {};
        for (std::int64_t i = 0; i < size; i += LANES) {
            const Lanes q = load(query + i);
            for (int k = 0; k < 8; k++) total[k] = fused(q, load(keys + (t + k) * size + i), total[k]);
        }
        store(scores + t, sums_of(total));
    }
    for (; t < count; t++) {
        Lanes total = {};
        for (std::int64_t i = 0; i < size; i += LANES) total = fused(load(query + i), load(keys + t * size + i), total);
        scores[t] = sum(total);
    }
}

// Adds a weighted sum of `count` values that lie `stride` apart, N lanes of each; even and odd ones apart, for the same reason.
template <int N> inline void weighted(const float *weights, std::int64_t count, const float *values, std::int64_t stride, Lanes (&sums)[N]) {
    Lanes odd[N] = {};
    std::int64_t t = 0;
    for (; t + 2 <= count; t += 2)
        for (int n = 0; n < N; n++) {
            sums[n] = fused(all(weights[t]), load(values + t * stride + n * LANES), sums[n]);
            odd[n] = fused(all(weights[t + 1]), load(values + (t + 1) * stride + n * LANES), odd[n]);
        }
    for (int n = 0; n < N; n++) {
        if (t < count) sums[n] = fused(all(weights[t]), load(values + t * stride + n * LANES), sums[n]);
        sums[n] += odd[n];
    }
}

}  // namespace

extern "C" {

struct Model {
    std::int64_t layers, hidden, inner, queries, heads, size, vocabulary;
    float epsilon, scale;
    const Layer *layer;
    const float *embedding, *last_norm;
    Linear head;
    const float *cosines, *sines;  // (longest, size)
};

struct Batch {
    std::int64_t rows, threads;
    const std::int64_t *token, *prompt_of_row, *prompt_length, *own_length;
    const float *prompt_cache;  // (layers, 2, prompts, heads, prompt_room, size)
    std::int64_t prompts, prompt_room;
    float *own_cache;  // (layers, 2, own_rows, heads, own_room, size)
    std::int64_t own_rows, own_room;
    float *scratch;  // scratch_floats of them
    float *logits;  // (rows, vocabulary)
};

// Lengths of a thread's scores: a head's queries against all places, in whole lanes.
static std::int64_t places(const Batch *batch) {
    return (batch->prompt_room + batch->own_room + LANES - 1) / LANES * LANES;
}

static std::int64_t own_floats(const Model *model, const Batch *batch, std::int64_t blocks) {
    return model->hidden * blocks * BLOCK + (model->queries / model->heads) * places(batch);
}

std::int64_t scratch_floats(const Model *model, const Batch *batch) {
    const std::int64_t blocks = (batch->rows + BLOCK - 1) / BLOCK, width = blocks * BLOCK;
    const std::int64_t projected = (model->queries + 2 * model->heads) * model->size;
    return width * (model->hidden + projected + model->queries * model->size + model->inner) +
           batch->threads * own_floats(model, batch, blocks);
}

void decode_step(const Model *model, const Batch *batch) {
    const std::int64_t rows = batch->rows, blocks = (rows + BLOCK - 1) / BLOCK, width = blocks * BLOCK;
    const std::int64_t hidden = model->hidden, inner = model->inner, size = model->size;
    const std::int64_t heads = model->heads, repeats = model->queries / heads;
    const std::int64_t asked = model->queries * size, held = heads * size, projected = asked + 2 * held;
    float *x = batch->scratch, *qkv = x + width * hidden, *found = qkv + width * projected, *middle = found + width * asked;
    float *own = middle + width * inner;
    const std::int64_t row_of_places = places(batch);

#pragma omp parallel num_threads(static_cast<int>(batch->threads))
    {
        float *h = own + omp_get_thread_num() * own_floats(model, batch, blocks), *scores = h + hidden * width;

#pragma omp for schedule(static)
        for (std::int64_t column = 0; column < width; column++) {
            float *to = x + column / BLOCK * hidden * BLOCK + column % BLOCK;
            const float *from = column < rows ? model->embedding + batch->token[column] * hidden : nullptr;
            for (std::int64_t i = 0; i < hidden; i++) to[i * BLOCK] = from ? from[i] : 0.0f;
            for (std::int64_t i = 0; column >= rows && i < asked; i++)  // what no row will write
                found[column / BLOCK * asked * BLOCK + i * BLOCK + column % BLOCK] = 0.0f;
        }
        for (std::int64_t number = 0; number < model->layers; number++) {
            const Layer &layer = model->layer[number];
            normed(layer.before_attention, model->epsilon, hidden, blocks, x, h);
            // (width, projected): a row's queries, keys and values side by side.
            const auto into = [&](std::int64_t start) {
                return [=](std::int64_t first, int count, std::int64_t block, Lanes(&sums)[PANEL][2]) {
                    for (int column = 0; column < BLOCK; column++) {
                        float *to = qkv + (block * BLOCK + column) * projected + start + first;
                        for (int m = 0; m < count; m++) to[m] = sums[m][column / LANES][column % LANES];
                    }
                };
            };
            product(layer.q, asked, hidden, h, rows, into(0));
            product(layer.k, held, hidden, h, rows, into(asked));
            product(layer.v, held, hidden, h, rows, into(asked + held));
#pragma omp barrier

            const float *prompt_keys = batch->prompt_cache + number * 2 * batch->prompts * heads * batch->prompt_room * size;
            const float *prompt_values = prompt_keys + batch->prompts * heads * batch->prompt_room * size;
            float *own_keys = batch->own_cache + number * 2 * batch->own_rows * heads * batch->own_room * size;
            float *own_values = own_keys + batch->own_rows * heads * batch->own_room * size;
#pragma omp for schedule(static)
            for (std::int64_t task = 0; task < rows * heads; task++) {
                const std::int64_t row = task / heads, head = task % heads, prompt = batch->prompt_of_row[row];
                const std::int64_t before = batch->prompt_length[prompt], newest = batch->own_length[row];
                const std::int64_t position = before + newest, seen = position + 1;
                const float *cosines = model->cosines + position * size, *sines = model->sines + position * size;
                float *q = qkv + row * projected + head * repeats * size;
                float *k = qkv + row * projected + asked + head * size, *v = k + held;
                if (task + 1 < rows * heads) {  // the next task's own keys and values are on their way meanwhile
                    const std::int64_t next = (task + 1) * batch->own_room * size, count = batch->own_length[(task + 1) / heads] * size;
                    for (std::int64_t i = 0; i < count; i += 16) {
                        __builtin_prefetch(own_keys + next + i, 0, 2);
                        __builtin_prefetch(own_values + next + i, 0, 2);
                    }
                }
                normed_head(layer.k_norm, model->epsilon, size, k);
                turned(cosines, sines, size, k);
                float *keys = own_keys + (row * heads + head) * batch->own_room * size;
                float *values = own_values + (row * heads + head) * batch->own_room * size;
                std::memcpy(keys + newest * size, k, size * sizeof(float));
                std::memcpy(values + newest * size, v, size * sizeof(float));
                const float *first_keys = prompt_keys + (prompt * heads + head) * batch->prompt_room * size;
                const float *first_values = prompt_values + (prompt * heads + head) * batch->prompt_room * size;
                for (std::int64_t r = 0; r < repeats; r++) {
                    float *query = q + r * size, *score = scores + r * row_of_places;
                    normed_head(layer.q_norm, model->epsilon, size, query);
                    turned(cosines, sines, size, query);
                    for (std::int64_t i = 0; i < size; i += LANES) store(query + i, load(query + i) * model->scale);
                    scored(query, first_keys, before, size, score);
                    scored(query, keys, newest + 1, size, score + before);
                    const float top = *std::max_element(score, score + seen);
                    for (std::int64_t t = seen; t < (seen + LANES - 1) / LANES * LANES; t++) score[t] = -INFINITY;
                    Lanes total = {};
                    for (std::int64_t t = 0; t < seen; t += LANES) {
                        const Lanes shifted = load(score + t) - top;
                        const Lanes weight = exponential(shifted);
                        store(score + t, weight);
                        if (t + LANES <= seen)
                            total += weight;
                        else
                            for (int lane = 0; lane < seen - t; lane++) total[lane] += weight[lane];
                    }
                    const float share = 1.0f / sum(total);
                    float *to = found + row / BLOCK * asked * BLOCK + row % BLOCK + (head * repeats + r) * size * BLOCK;
                    std::int64_t i = 0;
                    const auto mix = [&](auto lanes) {
                        constexpr int count = decltype(lanes)::value;
                        Lanes mixed[count] = {};
                        weighted<count>(score, before, first_values + i, size, mixed);
                        weighted<count>(score + before, newest + 1, values + i, size, mixed);
                        for (int n = 0; n < count; n++)
                            for (int lane = 0; lane < LANES; lane++, i++) to[i * BLOCK] = mixed[n][lane] * share;
                    };
                    while (i + 4 * LANES <= size) mix(std::integral_constant<int, 4>{});
                    while (i < size) mix(std::integral_constant<int, 1>{});
                }
            }
            const auto added = [=](std::int64_t first, int count, std::int64_t block, Lanes(&sums)[PANEL][2]) {
                float *to = x + (block * hidden + first) * BLOCK;
                for (int m = 0; m < count; m++)
                    for (int half = 0; half < 2; half++) {
                        float *place = to + m * BLOCK + half * LANES;
                        store(place, load(place) + sums[m][half]);
                    }
            };
            product(layer.o, hidden, asked, found, rows, added);
#pragma omp barrier
            normed(layer.before_mlp, model->epsilon, hidden, blocks, x, h);
            // A thread's tiles of gate and up are the same ones, so it need not wait in between.
            product(layer.gate, inner, hidden, h, rows, [=](std::int64_t first, int count, std::int64_t block, Lanes(&sums)[PANEL][2]) {
                for (int m = 0; m < count; m++)
                    for (int half = 0; half < 2; half++) {
                        const Lanes g = sums[m][half];
                        store(middle + (block * inner + first + m) * BLOCK + half * LANES, g / (1.0f + exponential(-g)));
                    }
            });
            product(layer.up, inner, hidden, h, rows, [=](std::int64_t first, int count, std::int64_t block, Lanes(&sums)[PANEL][2]) {
                for (int m = 0; m < count; m++)
                    for (int half = 0; half < 2; half++) {
                        float *place = middle + (block * inner + first + m) * BLOCK + half * LANES;
                        store(place, load(place) * sums[m][half]);
                    }
            });
#pragma omp barrier
            product(layer.down, hidden, inner, middle, rows, added);
#pragma omp barrier
        }
        normed(model->last_norm, model->epsilon, hidden, blocks, x, h);
        product(model->head, model->vocabulary, hidden, h, rows, [=](std::int64_t first, int count, std::int64_t block, Lanes(&sums)[PANEL][2]) {
            for (int column = 0; column < BLOCK && block * BLOCK + column < rows; column++) {
                float *to = batch->logits + (block * BLOCK + column) * model->vocabulary + first;
                for (int m = 0; m < count; m++) to[m] = sums[m][column / LANES][column % LANES];
            }
        });
    }
}

// Draws a token for each row of logits: the one whose interval of cumulated probability holds `uniform`, as `sampling.draw` does,
// and its log-probability under the temperature.
void draw_tokens(const float *logits, std::int64_t rows, std::int64_t vocabulary, float temperature, const float *uniform,
                 std::int64_t *token, float *logp, std::int64_t threads) {
    const std::int64_t spans = (vocabulary + SPAN - 1) / SPAN;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (std::int64_t row = 0; row < rows; row++) {
        const float *from = logits + row * vocabulary, scale = 1.0f / temperature;
        std::vector<double> ends(spans);
        Lanes tops = all(-INFINITY);
        std::int64_t i = 0;
        for (; i + LANES <= vocabulary; i += LANES) {
            const Lanes v = load(from + i);
            tops = v > tops ? v : tops;
        }
        float top = -INFINITY;
        for (int lane = 0; lane < LANES; lane++) top = std::max(top, tops[lane]);
        for (; i < vocabulary; i++) top = std::max(top, from[i]);

        Lanes weights[SPAN / LANES];
        const auto weigh = [&](std::int64_t span) {  // what a span's tokens weigh; nothing behind the last
            const std::int64_t count = std::min<std::int64_t>(SPAN, vocabulary - span * SPAN);
            Lanes total = {};
            for (std::int64_t t = 0; t < count; t += LANES) {
                Lanes v = all(-INFINITY);
                if (t + LANES <= count)
                    v = load(from + span * SPAN + t);
                else
                    for (int lane = 0; lane < count - t; lane++) v[lane] = from[span * SPAN + t + lane];
                const Lanes shifted = (v - top) * scale;
                weights[t / LANES] = shifted > all(-87.0f) ? exponential(shifted) : Lanes{};
                total += weights[t / LANES];
            }
            return static_cast<double>(sum(total));
        };
        double total = 0;
        for (std::int64_t span = 0; span < spans; span++) ends[span] = total += weigh(span);
        const double target = static_cast<double>(uniform[row]) * total;
        const std::int64_t span = std::min<std::int64_t>(std::upper_bound(ends.begin(), ends.end(), target) - ends.begin(), spans - 1);
        weigh(span);
        const std::int64_t count = std::min<std::int64_t>(SPAN, vocabulary - span * SPAN);
        double passed = span ? ends[span - 1] : 0.0;
        std::int64_t chosen = -1;  // rounding may leave the target behind the last: then the last that weighs anything is meant
        for (std::int64_t t = 0; t < count && (chosen < 0 || passed <= target); t++) {
            const float weight = weights[t / LANES][t % LANES];
            passed += weight;
            if (weight > 0) chosen = t;
        }
        token[row] = span * SPAN + std::max<std::int64_t>(chosen, 0);  // logits that are no numbers: so is the log-probability then
        logp[row] = (from[token[row]] - top) * scale - static_cast<float>(std::log(total));
    }
}
// What was built in, as words: the instructions that are written out, and threads.
const char *kernel_features() {
    return ""
#ifdef R1_AVX
           "AVX "
#ifdef __FMA__
           "FMA "
#endif
#endif
#ifdef R1_NEON
           "NEON "
#endif
#ifdef _OPENMP
           "OpenMP"
#endif
        ;
}
}
