// Calls every kernel on small made-up inputs and prints what comes out, a number per line. `test_builds.py` compiles it
// for several instruction sets and compares.
#include "attend.cpp"
#include "decode.cpp"

#include <cstdio>

static std::uint32_t state = 1;

// `count` numbers in [-1, 1).
static std::vector<float> numbers(std::int64_t count) {
    std::vector<float> made(count);
    for (float &value : made) value = ((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
    return made;
}

static void print(const char *name, const std::vector<float> &values) {
    for (std::size_t i = 0; i < values.size(); i++) std::printf("%s[%zu] %.9g\n", name, i, values[i]);
}

static void attention() {
    const std::int64_t S = 2, G = 3, L = 9, C = 19, H = 4, K = 2, d = 16, prompt_length[] = {19, 13};
    const std::int64_t asked = S * G * L * H * d, held = S * G * L * K * d, read = S * C * K * d, out_read = S * C * H * d;
    const auto query = numbers(asked), key = numbers(held), value = numbers(held), prompt_key = numbers(read),
               prompt_value = numbers(read), gradient = numbers(asked);
    std::vector<float> out(asked), total(S * G * L * H), to_query(asked), to_key(asked), to_value(asked), to_prompt_key(out_read),
        to_prompt_value(out_read);
    Attention a = {S, G, L, C, H, K, d, 2, 0.3f, prompt_length, query.data(), key.data(), value.data(), prompt_key.data(),
                   prompt_value.data(), out.data(), total.data(), gradient.data(), to_query.data(), to_key.data(), to_value.data(),
                   to_prompt_key.data(), to_prompt_value.data(), nullptr};
    std::vector<float> scratch(a.threads * attention_scratch(&a));
    a.scratch = scratch.data();
    attention_forward(&a);
    attention_backward(&a);
    print("out", out), print("total", total), print("to_query", to_query), print("to_key", to_key), print("to_value", to_value);
    print("to_prompt_key", to_prompt_key), print("to_prompt_value", to_prompt_value);
}

static void decoding() {
    const std::int64_t rows = 11, hidden = 20, inner = 45, queries = 4, heads = 2, size = 16, vocabulary = 301, longest = 40;
    const std::int64_t prompts = 2, prompt_room = 18, own_room = 12, asked = queries * size, held = heads * size;
    const auto norm = numbers(hidden), q = numbers(asked * hidden), k = numbers(held * hidden), v = numbers(held * hidden),
               o = numbers(hidden * asked), gate = numbers(inner * hidden), up = numbers(inner * hidden),
               down = numbers(hidden * inner), bias = numbers(asked), q_norm = numbers(size), embedding = numbers(vocabulary * hidden),
               cosines = numbers(longest * size), sines = numbers(longest * size),
               prompt_cache = numbers(2 * prompts * heads * prompt_room * size);
    auto own_cache = numbers(2 * rows * heads * own_room * size);
    const Layer layer = {norm.data(), {q.data(), bias.data()}, {k.data(), nullptr}, {v.data(), nullptr}, q_norm.data(), nullptr,
                         {o.data(), nullptr}, norm.data(), {gate.data(), nullptr}, {up.data(), nullptr}, {down.data(), nullptr}};
    Model model = {};
    model.layers = 1, model.hidden = hidden, model.inner = inner, model.queries = queries, model.heads = heads, model.size = size;
    model.vocabulary = vocabulary, model.epsilon = 1e-6f, model.scale = 0.25f, model.layer = &layer;
    model.embedding = embedding.data(), model.last_norm = norm.data(), model.head = {embedding.data(), nullptr};
    model.cosines = cosines.data(), model.sines = sines.data();
    std::vector<std::int64_t> token(rows), prompt_of_row(rows), own_length(rows), drawn(rows);
    for (std::int64_t row = 0; row < rows; row++) token[row] = row * 7 % vocabulary, prompt_of_row[row] = row % 2, own_length[row] = row;
    const std::int64_t prompt_length[] = {17, 9};
    std::vector<float> logits(rows * vocabulary), logp(rows);
    Batch batch = {};
    batch.rows = rows, batch.threads = 2, batch.token = token.data(), batch.prompt_of_row = prompt_of_row.data();
    batch.prompt_length = prompt_length, batch.own_length = own_length.data(), batch.prompt_cache = prompt_cache.data();
    batch.prompts = prompts, batch.prompt_room = prompt_room, batch.own_cache = own_cache.data(), batch.own_rows = rows;
    batch.own_room = own_room, batch.logits = logits.data();
    std::vector<float> scratch(scratch_floats(&model, &batch));
    batch.scratch = scratch.data();
    decode_step(&model, &batch);
    print("logits", logits), print("own_cache", own_cache);
    const auto uniform = numbers(rows);
    std::vector<float> from_zero(rows);
    for (std::int64_t row = 0; row < rows; row++) from_zero[row] = (uniform[row] + 1) / 2;
    draw_tokens(logits.data(), rows, vocabulary, 1.3f, from_zero.data(), drawn.data(), logp.data(), 2);
    print("drawn", {drawn.begin(), drawn.end()}), print("logp", logp);
}

int main() {
    std::fprintf(stderr, "%s\n", kernel_features());
    attention();
    decoding();
}
