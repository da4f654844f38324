// The inner loop of word2vec: skip-gram and CBOW with negative samples or a Huffman tree. vectors/plain.py is the same
// written to be read, and gives the same numbers up to rounding.
#include "vectors.h"

#include <cmath>
#include <vector>

using namespace octavo;

namespace {

constexpr int kMost = 128;  // outputs of one prediction: negative samples, or nodes on a path

uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct Draws {
  uint64_t state;
  uint64_t next() { return mix(state += 0x9e3779b97f4a7c15u); }
  int64_t below(uint64_t n) { return int64_t(((next() >> 32) * n) >> 32); }
};

struct Kept {
  int32_t token;
  int64_t place;
  Draws draws;
};

}  // namespace

extern "C" struct Task {  // the same fields stand in vectors/native.py
  float* input;
  float* output;
  const int32_t* tokens;
  const int64_t* starts;
  const uint64_t* keep;
  const uint32_t* share;
  const int32_t* other;
  const int64_t* path_starts;
  const int32_t* path_nodes;
  const float* path_signs;
  int64_t words, first, last, done, total, predictions;
  uint64_t key;
  double rate, least_rate, loss;
  int32_t width, window, negative, cbow, whole;
};

namespace {

// What one prediction is told: output rows, and +1 where the answer is yes, -1 where it is no.
struct Outputs {
  int n = 0;
  int32_t rows[kMost];
  alignas(64) float signs[kMost];
};

struct Loop {
  Task& task;
  double likelihood = 1, loss = 0;  // the product of probabilities whose logarithm is still to be taken
  int64_t predictions = 0;
  std::vector<Kept> kept;
  std::vector<Floats> hidden, error;

  explicit Loop(Task& t) : task(t), hidden(t.width / kVector), error(t.width / kVector) {}

  float* in(int32_t row) const { return task.input + int64_t(row) * task.width; }
  float* out(int32_t row) const { return task.output + int64_t(row) * task.width; }

  void choose(int32_t target, Draws& draws, Outputs& o) const {
    o.n = 0;
    if (task.negative == 0) {
      for (int64_t i = task.path_starts[target]; i < task.path_starts[target + 1]; ++i, ++o.n) {
        o.rows[o.n] = task.path_nodes[i];
        o.signs[o.n] = task.path_signs[i];
      }
    } else {
      o.rows[0] = target;
      o.signs[0] = 1.f;
      o.n = 1;
      for (int k = 0; k < task.negative; ++k) {
        const uint64_t r = draws.next();
        const int64_t slot = int64_t(((r >> 32) * uint64_t(task.words)) >> 32);
        const int32_t row = uint32_t(r) < task.share[slot] ? int32_t(slot) : task.other[slot];
        if (row == target) continue;
        o.rows[o.n] = row;
        o.signs[o.n++] = -1.f;
      }
    }
    for (int k = 0; k < o.n; ++k)
      for (int c = 0; c < task.width; c += 16) __builtin_prefetch(out(o.rows[k]) + c, 1);
  }

  // One step of gradient descent on the outputs' rows; the step of x itself is added to ``error``.
  void predict(const float* x, const Outputs& o, float rate, Floats* errors) {
    alignas(64) float score[kMost], step[kMost], right[kMost];
    const int width = task.width;
    for (int k = 0; k < o.n; ++k) {
      const float* row = out(o.rows[k]);
      Floats s{};
      for (int c = 0; c < width; c += kVector) s += load(x + c) * load(row + c);
      score[k] = o.signs[k] * sum(s);
    }
    for (int k = o.n; k % kVector; ++k) score[k] = 0.f;
    for (int k = 0; k < o.n; k += kVector) {
      Floats power = load(score + k) * spread(-1.44269504f);
      power = power > spread(126.f) ? spread(126.f) : power;
      const Floats e = exp2(power), p = spread(1.f) / (spread(1.f) + e);
      store(right + k, p);
      store(step + k, load(o.signs + k) * (e * p) * spread(rate));
    }
    for (int k = 0; k < o.n; ++k) likelihood *= right[k];
    if (!(likelihood > 1e-200)) flush();
    predictions += o.n;
    for (int c = 0; c < width; c += kVector) {
      Floats e{};
      for (int k = 0; k < o.n; ++k) e += spread(step[k]) * load(out(o.rows[k]) + c);
      errors[c / kVector] += e;
      const Floats xc = load(x + c);
      for (int k = 0; k < o.n; ++k) {  // a row that was drawn twice takes both steps
        float* row = out(o.rows[k]) + c;
        store(row, load(row) + spread(step[k]) * xc);
      }
    }
  }

  void flush() {
    loss -= std::log(likelihood);
    likelihood = 1;
  }

  void add(float* row, const Floats* step, float times) const {
    for (int c = 0; c < task.width; c += kVector) store(row + c, load(row + c) + step[c / kVector] * spread(times));
  }

  void sentence(int64_t from, int64_t to) {
    kept.clear();
    for (int64_t place = from; place < to; ++place) {
      Draws draws{mix(task.key + uint64_t(place))};
      if ((draws.next() >> 32) < task.keep[task.tokens[place]]) kept.push_back({task.tokens[place], place, draws});
    }
    const int64_t n = int64_t(kept.size());
    for (int64_t i = 0; i < n; ++i) {
      Draws draws = kept[i].draws;
      const int64_t span = 1 + draws.below(uint64_t(task.window));
      const int64_t lo = i > span ? i - span : 0, hi = i + span + 1 < n ? i + span + 1 : n;
      if (hi - lo < 2) continue;
      const double progress = double(task.done + kept[i].place) / double(task.total);
      const double now = task.rate - (task.rate - task.least_rate) * progress;
      const float rate = float(now > task.least_rate ? now : task.least_rate);
      if (task.cbow) bag(i, lo, hi, draws, rate); else pairs(i, lo, hi, draws, rate);
    }
  }

  void pairs(int64_t i, int64_t lo, int64_t hi, Draws& draws, float rate) {
    Outputs chosen[2];
    float* x = in(kept[i].token);
    int64_t j = lo == i ? lo + 1 : lo;
    choose(kept[j].token, draws, chosen[0]);
    for (int turn = 0; j < hi; turn ^= 1) {
      const int64_t next = j + 1 == i ? j + 2 : j + 1;
      if (next < hi) choose(kept[next].token, draws, chosen[turn ^ 1]);  // its rows are fetched meanwhile
      for (auto& e : error) e = Floats{};
      predict(x, chosen[turn], rate, error.data());
      add(x, error.data(), 1.f);
      j = next;
    }
  }

  void bag(int64_t i, int64_t lo, int64_t hi, Draws& draws, float rate) {
    Outputs chosen;
    choose(kept[i].token, draws, chosen);
    const float share = 1.f / float(hi - lo - 1);
    for (auto& h : hidden) h = Floats{};
    for (int64_t j = lo; j < hi; ++j)
      if (j != i) add(reinterpret_cast<float*>(hidden.data()), reinterpret_cast<Floats*>(in(kept[j].token)), share);
    for (auto& e : error) e = Floats{};
    predict(reinterpret_cast<float*>(hidden.data()), chosen, rate, error.data());
    for (int64_t j = lo; j < hi; ++j)
      if (j != i) add(in(kept[j].token), error.data(), task.whole ? 1.f : share);
  }
};

}  // namespace

extern "C" int64_t word2vec_width() { return kVector; }

extern "C" int64_t word2vec_size() { return int64_t(sizeof(Task)); }

extern "C" void word2vec_train(Task* task) {
  Loop loop(*task);
  for (int64_t s = task->first; s < task->last; ++s) loop.sentence(task->starts[s], task->starts[s + 1]);
  loop.flush();
  task->loss = loop.loss;
  task->predictions = loop.predictions;
}
