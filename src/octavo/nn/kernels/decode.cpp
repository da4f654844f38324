// A step of a whole decoder: some tokens of some sequences in, logits out. One call a step and one team of threads for
// all of it; what bounds it is reading the weights once. Decoding, a piece of a prompt and the verification of a draft
// are the same step: all keys and values are written before any is read, and what a token gets depends on no other.
// Activations are fp32 throughout, rounded only for products: to 15 bits with quantised weights, to 11 with fp16 ones.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "decode_attention.h"
#include "decode_product.h"
#include "decode_team.h"

namespace octavo {
namespace {

// x * sigmoid(k x), by 16.
inline Lanes swish(Lanes x, Lanes kx) {
  const Lanes size = kx > -kx ? kx : -kx, e = exponential(-size);  // no overflow: e <= 1
  const Lanes upper = lanes(1.f) / (lanes(1.f) + e);
  return x * (kx > Lanes{} ? upper : e * upper);
}

inline Lanes activate(int64_t kind, Lanes x) {
  switch (kind) {
    case 0: return swish(x, x);  // silu
    case 1: {                    // gelu
      Lanes y;
      for (int i = 0; i < kLanes; ++i) y[i] = 0.5f * x[i] * (1.f + std::erf(x[i] * 0.70710678f));
      return y;
    }
    case 2: return swish(x, lanes(1.59576912f) * (x + lanes(0.044715f) * x * x * x));  // its tanh form
    default: return x > Lanes{} ? x : Lanes{};                                        // relu
  }
}

// out = x / rms(x) * weight.
void normalise(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Lanes parts = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) parts += get(x + i) * get(x + i);
  float squares = 0;
  for (int j = 0; j < kLanes; ++j) squares += parts[j];
  for (; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.f / std::sqrt(squares / float(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// cos and sin (R/2,) of a position; the channels after R are left alone.
void rotate(float* x, const float* cos, const float* sin, int64_t R, bool interleaved) {
  const int64_t half = R / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    const float u = x[a], v = x[b];
    x[a] = u * cos[i] - v * sin[i];
    x[b] = v * cos[i] + u * sin[i];
  }
}

struct Sizes {
  int64_t D, H, G, K, V, n_layers, R, interleaved, activation, gated, narrow_embedding;
};

struct Scales {
  float eps, head_eps, query, cap, embedding;  // cap: the bound of scores, 0 for none
};

struct Layer {
  const float *norm_mixer, *norm_channel, *mixer_out, *channel_out, *q_norm, *k_norm;  // 0 where there is none
  int64_t window;  // how many slots are read, its own included; 0: all
  int64_t turn;    // which of the rotations is this layer's; -1: none
  Matrix qkv, o, up, down;  // qkv: whole units for each head; up: half of each unit is the gate, if there is one
};

// A layer's keys and values: in blocks, or in a ring for each row of the state, whose last entry takes nothing here. A
// ring says of each entry which slot it holds, and of which document.
struct Memory {
  void *keys, *values;
  int64_t ring;  // entries of a ring with the last one; 0 where there are blocks
  int64_t *slots, *docs;
};

// What a step is asked: N tokens; `sequence` says which of the tables (n_max blocks each) is whose. A token's key and
// value go to its slot, and it reads the slots from its first one on. turns (rotations, n_positions, R): cos, then sin.
struct Request {
  int64_t N, n_wanted, n_max, block_size, n_positions;
  const int64_t *tokens, *sequence, *slots, *positions, *first, *rows, *docs, *wanted;
  const int32_t* tables;
  const float* turns;
  const Memory* memory;   // of each layer
  float* logits;          // (n_wanted, V)
  int64_t n_rows;         // of the rings
  const int64_t* begins;  // 0, or where several tokens go to one ring: the first token in the step of each one's sequence
};

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// What the whole team has to do, n pieces: each member takes its own share in order, so that what it asks memory for
// ahead is what it takes next, and then what others have left: who is held up takes fewer.
struct Pieces {
  Counter* counters;
  int64_t n, members, own;

  int64_t begin(int64_t member) const { return n * member / members; }
  int64_t end() const { return begin(own + 1); }
  // -1: there are no more.
  int64_t take() {
    for (int64_t i = 0; i < members; ++i) {
      const int64_t whose = (own + i) % members, first = begin(whose), size = begin(whose + 1) - first;
      if (i > 0 && counters[whose].next.load(std::memory_order_relaxed) >= size) continue;
      const int64_t piece = counters[whose].take();
      if (piece < size) return first + piece;
    }
    return -1;
  }
};

struct Own {
  std::vector<float> normed, tile, scratch;
  std::vector<int64_t> entries;
  Rows rows;
};

template <class T> inline T* fit(std::vector<T>& x, int64_t n) {
  if (int64_t(x.size()) < n) x.resize(size_t(n));
  return x.data();
}

class Decoder {
 public:
  Sizes s;
  Scales scales;
  const void* embedding;
  const float* norm;
  Matrix head;
  std::vector<Layer> layers;

  void step(const Request& request, bool narrow, int threads) {
    on_team(std::max(threads, 1), [&](Team& team, int id) {
      if (id == 0) begin(request, team.size());
      team.meet();
      if (narrow)
        Work<bf16>{*this, request, team, own_[size_t(id)], id}.run();
      else
        Work<float>{*this, request, team, own_[size_t(id)], id}.run();
    });
  }

 private:
  void begin(const Request& r, int threads) {
    own_.resize(std::max(own_.size(), size_t(threads)));
    const size_t n_counters = size_t(8 * s.n_layers + 2) * size_t(threads);
    if (n_counters_ < n_counters) counters_ = std::make_unique<Counter[]>(n_counters), n_counters_ = n_counters;
    for (size_t i = 0; i < n_counters; ++i) counters_[i].next.store(0, std::memory_order_relaxed);
    const auto zeros = [](std::vector<float>& x, int64_t n) {  // what lies between rows is read, as nothing
      if (int64_t(x.size()) < n) x.assign(size_t(n), 0.f);
    };
    zeros(x_, r.N * s.D), zeros(q_, r.N * s.H * padded_head());
    zeros(mixed_, r.N * layers[0].o.depth), zeros(hidden_, r.N * layers[0].down.depth), zeros(branch_, r.N * s.D);
  }
  int64_t padded_head() const { return (s.K + kChannels - 1) / kChannels * kChannels; }

  // One thread's part of a step; C is what the pools hold.
  template <class C> struct Work {
    Decoder& d;
    const Request& r;
    Team& team;
    Own& own;
    int64_t member, phase = 0;

    Pieces share_out(int64_t n) { return {&d.counters_[size_t(phase++ * team.size())], n, team.size(), member}; }

    void run() {
      const Sizes& s = d.s;
      Pieces rows = share_out(r.N);
      for (int64_t m; (m = rows.take()) >= 0;)
        for (int64_t i = 0; i < s.D; ++i) {
          const int64_t at = r.tokens[m] * s.D + i;
          const float x = s.narrow_embedding ? to_float(static_cast<const bf16*>(d.embedding)[at])
                                             : static_cast<const float*>(d.embedding)[at];
          d.x_[size_t(m * s.D + i)] = x * d.scales.embedding;
        }
      team.meet();
      for (int64_t l = 0; l < s.n_layers; ++l) {
        const Layer& layer = d.layers[size_t(l)];
        const Matrix& last = l + 1 < s.n_layers ? d.layers[size_t(l + 1)].qkv : d.head;
        keys_and_queries(layer, l);
        team.meet();
        read(l);
        team.meet();
        keep(l);
        add(layer.o, d.mixed_.data(), layer.mixer_out, share_of(layer.up, layer.up.units));
        team.meet();
        widen(layer);
        team.meet();
        add(layer.down, d.hidden_.data(), layer.channel_out, share_of(last, l + 1 < s.n_layers ? s.H + 2 * s.G : last.units));
        team.meet();
      }
      logits();
    }

    // Where this member's share of p begins, which is cut between `parts` equal pieces of it.
    const uint8_t* share_of(const Matrix& p, int64_t parts) const {
      return p.weight + p.units / parts * (parts * member / team.size()) * p.unit_bytes();
    }
    // What is read after unit u: the next one of the own share, which ends at unit `end`, or of the next product.
    static const uint8_t* after(const Matrix& p, int64_t u, int64_t end, const uint8_t* next) {
      return u + 1 < end ? p.weight + (u + 1) * p.unit_bytes() : next;
    }

    // The norm of x's rows, or those as they are, ready for a product with p.
    void normed(const float* weight, const Matrix& p, const int64_t* which, int64_t n) {
      if (int64_t(own.normed.size()) < n * p.depth) own.normed.assign(size_t(n * p.depth), 0.f);
      for (int64_t m = 0; m < n; ++m)
        normalise(&d.x_[size_t((which ? which[m] : m) * d.s.D)], weight, &own.normed[size_t(m * p.depth)]);
      own.rows.prepare(p, own.normed.data(), p.depth, n);
    }

    void normalise(const float* x, const float* weight, float* out) {
      if (weight)
        octavo::normalise(x, weight, d.scales.eps, d.s.D, out);
      else
        std::copy_n(x, d.s.D, out);
    }

    void keys_and_queries(const Layer& l, int64_t at) {
      const Sizes& s = d.s;
      normed(l.norm_mixer, l.qkv, nullptr, r.N);
      const int64_t units = l.qkv.units / (s.H + 2 * s.G), width = units * l.qkv.outputs();
      float* tile = fit(own.tile, r.N * width);
      Pieces heads = share_out(s.H + 2 * s.G);
      for (int64_t h; (h = heads.take()) >= 0;) {
        for (int64_t u = 0; u < units; ++u)
          multiply(l.qkv, h * units + u, own.rows, r.N, tile + u * l.qkv.outputs(), width,
                   after(l.qkv, h * units + u, heads.end() * units, share_of(l.o, l.o.units)));
        for (int64_t m = 0; m < r.N; ++m) place(l, at, h, m, tile + m * width);
      }
    }

    // Head h of row m: a query to be asked, a key or a value to be kept.
    void place(const Layer& l, int64_t at, int64_t h, int64_t m, float* x) {
      const Sizes& s = d.s;
      const float* norm = h < s.H ? l.q_norm : l.k_norm;
      if (h < s.H + s.G) {
        if (norm) octavo::normalise(x, norm, d.scales.head_eps, s.K, x);
        const float* turn = r.turns + (l.turn * r.n_positions + r.positions[m]) * s.R;
        if (s.R && l.turn >= 0) rotate(x, turn, turn + s.R / 2, s.R, s.interleaved != 0);
      }
      if (h < s.H) {
        float* q = &d.q_[size_t((m * s.H + h) * d.padded_head())];
        if (s.K % kChannels) std::fill_n(q + s.K / kChannels * kChannels, kChannels, 0.f);
        for (int64_t i = 0; i < s.K; ++i) q[place_of<C>(i)] = x[i] * d.scales.query;
        return;
      }
      const Memory& memory = r.memory[at];
      const int64_t entry = !memory.ring  ? entry_of(r.tables + r.sequence[m] * r.n_max, r.block_size, r.slots[m])
                            : r.begins ? aside(memory, m)
                                       : ring_entry(memory, m);
      if (memory.ring && !r.begins && h == s.H) memory.slots[entry] = r.slots[m], memory.docs[entry] = r.docs[m];
      C* pool = static_cast<C*>(h >= s.H + s.G ? memory.values : memory.keys);
      C* to = pool + (entry * s.G + (h - s.H) % s.G) * s.K;
      for (int64_t i = 0; i < s.K; ++i) to[i] = from_float<C>(x[i]);
    }

    int64_t ring_entry(const Memory& memory, int64_t m) const {
      return r.rows[m] * memory.ring + r.slots[m] % (memory.ring - 1);
    }
    // Where token m is kept until all have read, if it may be in the place of what an earlier one reads: behind the rings.
    int64_t aside(const Memory& memory, int64_t m) const { return r.n_rows * memory.ring + m; }

    // What was kept aside goes to the rings: of each sequence as much as they hold.
    void keep(int64_t at) {
      const Memory& memory = r.memory[at];
      if (!memory.ring || !r.begins) return;
      const int64_t width = d.s.G * d.s.K;
      C *keys = static_cast<C*>(memory.keys), *values = static_cast<C*>(memory.values);
      Pieces tokens = share_out(r.N);
      for (int64_t m; (m = tokens.take()) >= 0;) {
        const int64_t later = m + memory.ring - 1;  // whose entry would be the same
        if (later < r.N && r.begins[later] == r.begins[m]) continue;
        const int64_t from = aside(memory, m), to = ring_entry(memory, m);
        std::copy_n(keys + from * width, width, keys + to * width);
        std::copy_n(values + from * width, width, values + to * width);
        memory.slots[to] = r.slots[m], memory.docs[to] = r.docs[m];
      }
    }

    // The n entries of a ring that token m reads from slot `first` on; those of this step from where they are kept aside.
    void list_own(const Memory& memory, int64_t m, int64_t first, int64_t n, int64_t* entries) {
      const int64_t fresh = r.begins ? std::min(n, m - r.begins[m] + 1) : 0, old = n - fresh;
      if (old > 0) list_ring(r.rows[m] * memory.ring, memory.ring - 1, first, old, entries);
      for (int64_t i = 0; i < fresh; ++i) entries[old + i] = aside(memory, m - fresh + 1 + i);
      std::fill_n(entries + n, kEarly, entries[n - 1]);
    }

    void read(int64_t at) {
      const Sizes& s = d.s;
      const int64_t window = d.layers[size_t(at)].window;
      // Up to four heads of a key head at a time; all of a token's in one piece if there are tokens enough, for then
      // its entries are listed once and read while they are near.
      const int64_t alike = s.H / s.G, batches = (alike + 3) / 4, each = r.N < 2 * team.size() ? 1 : s.G * batches;
      const int64_t pieces = s.G * batches / each;
      Pieces tasks = share_out(r.N * pieces);
      for (int64_t task; (task = tasks.take()) >= 0;) {
        // The last rows first: of a piece of a prompt they read the most.
        const int64_t m = r.N - 1 - task / pieces;
        const int64_t first = window ? std::max(r.first[m], r.slots[m] - window + 1) : r.first[m];
        const int64_t n = r.slots[m] - first + 1;
        fit(own.scratch, 4 * (n + kLanes));
        int64_t* entries = fit(own.entries, n + kEarly);
        if (r.memory[at].ring)
          list_own(r.memory[at], m, first, n, entries);
        else
          list_entries(r.tables + r.sequence[m] * r.n_max, r.block_size, first, n, entries);
        for (int64_t i = task % pieces * each, end = i + each; i < end; ++i) {
          const int64_t g = i / batches, begin = i % batches * 4, heads = std::min<int64_t>(4, alike - begin);
          read(at, m, n, g, g * alike + begin, heads);
        }
      }
    }

    void read(int64_t at, int64_t m, int64_t n, int64_t g, int64_t h, int64_t heads) {
      const Sizes& s = d.s;
      C *keys = static_cast<C*>(r.memory[at].keys), *values = static_cast<C*>(r.memory[at].values);
      const int64_t wide = d.padded_head();
      const Pool<C> pool{keys + g * s.K, values + g * s.K, s.G * s.K, s.K};
      const float* q = &d.q_[size_t((m * s.H + h) * wide)];
      float* out = &d.mixed_[size_t(m * d.layers[0].o.depth + h * s.K)];
      const auto attend_heads = [&](auto attend) { attend(pool, own.entries.data(), n, q, wide, d.scales.cap, own.scratch.data(), out); };
      const bool usual = s.K == 64;
      switch (heads) {
        case 1: return attend_heads(usual ? attend<1, 2, C> : attend<1, 0, C>);
        case 2: return attend_heads(usual ? attend<2, 2, C> : attend<2, 0, C>);
        case 3: return attend_heads(usual ? attend<3, 2, C> : attend<3, 0, C>);
        default: return attend_heads(usual ? attend<4, 2, C> : attend<4, 0, C>);
      }
    }

    // x += the product of rows with p, or the norm of it.
    void add(const Matrix& p, const float* rows, const float* norm, const uint8_t* next) {
      const int64_t width = p.outputs(), D = d.s.D;
      own.rows.prepare(p, rows, p.depth, r.N);
      float* tile = fit(own.tile, r.N * width);
      Pieces units = share_out(p.units);
      for (int64_t u; (u = units.take()) >= 0;) {
        multiply(p, u, own.rows, r.N, tile, width, after(p, u, units.end(), next));
        for (int64_t m = 0; m < r.N; ++m) {
          const int64_t at = m * D + u * width, n = std::min(width, D - u * width);
          for (int64_t i = 0; i < n && norm; ++i) d.branch_[size_t(at + i)] = tile[m * width + i];
          for (int64_t i = 0; i < n && !norm; ++i) d.x_[size_t(at + i)] += tile[m * width + i];
        }
      }
      if (!norm) return;
      team.meet();
      Pieces whole = share_out(r.N);
      for (int64_t m; (m = whole.take()) >= 0;) {
        float* branch = &d.branch_[size_t(m * D)];
        normalise(branch, norm, branch);
        for (int64_t i = 0; i < D; ++i) d.x_[size_t(m * D + i)] += branch[i];
      }
    }

    void widen(const Layer& l) {
      normed(l.norm_channel, l.up, nullptr, r.N);
      const int64_t width = l.up.outputs(), kept = d.s.gated ? width / 2 : width, stride = l.down.depth;
      float* tile = fit(own.tile, r.N * width);
      Pieces units = share_out(l.up.units);
      for (int64_t u; (u = units.take()) >= 0;) {
        multiply(l.up, u, own.rows, r.N, tile, width, after(l.up, u, units.end(), share_of(l.down, l.down.units)));
        for (int64_t m = 0; m < r.N; ++m)
          for (int64_t i = 0; i < kept && u * kept + i < stride; i += kLanes) {
            const Lanes y = activate(d.s.activation, get(tile + m * width + i));
            put(&d.hidden_[size_t(m * stride + u * kept + i)], d.s.gated ? y * get(tile + m * width + kept + i) : y);
          }
      }
    }

    void logits() {
      if (r.n_wanted == 0) return;
      const int64_t width = d.head.outputs(), V = d.s.V;
      normed(d.norm, d.head, r.wanted, r.n_wanted);
      float* tile = fit(own.tile, r.n_wanted * width);
      Pieces units = share_out(d.head.units);
      const uint8_t* first = share_of(d.layers[0].qkv, d.s.H + 2 * d.s.G);  // of the next step
      for (int64_t u; (u = units.take()) >= 0;) {
        multiply(d.head, u, own.rows, r.n_wanted, tile, width, after(d.head, u, units.end(), first));
        for (int64_t m = 0; m < r.n_wanted; ++m)
          std::copy_n(tile + m * width, std::min(width, V - u * width), r.logits + m * V + u * width);
      }
    }
  };

  std::vector<float> x_, q_, mixed_, hidden_, branch_;
  std::vector<Own> own_;
  std::unique_ptr<Counter[]> counters_;
  size_t n_counters_ = 0;
};

Matrix matrix(const int64_t*& n) {
  const Matrix p = {n[0], n[1], n[2], n[3], n[4], reinterpret_cast<const uint8_t*>(n[5]),
                    reinterpret_cast<const float*>(n[6]), reinterpret_cast<const float*>(n[7])};
  n += 8;
  return p;
}
const float* floats(const int64_t*& n) { return reinterpret_cast<const float*>(*n++); }

// The first thing a request asks that is not there: 0 if none, else 1 + its place in tokens, sequence, slots, positions,
// first, wanted, tables, rows. n_rows: of rings; 0 where there are none.
int refused(const Request& r, int64_t V, int64_t n_sequences, int64_t n_blocks, bool blocks) {
  const auto outside = [](int64_t i, int64_t n) { return i < 0 || i >= n; };
  for (int64_t m = 0; m < r.N; ++m) {
    if (outside(r.tokens[m], V)) return 1;
    if (outside(r.sequence[m], n_sequences)) return 2;
    if (outside(r.slots[m], blocks ? r.n_max * r.block_size : INT64_MAX)) return 3;
    if (outside(r.positions[m], r.n_positions)) return 4;
    if (outside(r.first[m], r.slots[m] + 1)) return 5;
    if (r.n_rows && outside(r.rows[m], r.n_rows)) return 8;
    if (!blocks) continue;
    const int32_t* table = r.tables + r.sequence[m] * r.n_max;
    for (int64_t b = r.first[m] / r.block_size; b <= r.slots[m] / r.block_size; ++b)
      if (outside(table[b], n_blocks)) return 7;
  }
  for (int64_t w = 0; w < r.n_wanted; ++w)
    if (outside(r.wanted[w], r.N)) return 6;
  return 0;
}

// Where the tokens of each one's ring begin in a step: false if they are not one after the other.
bool ordered(const Request& r, int64_t* begins) {
  for (int64_t m = 0; m < r.N; ++m) {
    const bool on = m > 0 && r.rows[m] == r.rows[m - 1];
    if (on ? r.slots[m] != r.slots[m - 1] + 1 : std::find(r.rows, r.rows + m, r.rows[m]) != r.rows + m) return false;
    begins[m] = on ? begins[m - 1] : m;
  }
  return true;
}

}  // namespace
}  // namespace octavo

extern "C" {

// sizes: those of Sizes. scales: those of Scales. parts: the embedding and the last norm; the head; then of each layer
// six norms (addresses or 0), window and turn as in Layer, and the matrices qkv, o, up, down, each format, units, width,
// depth, group and the addresses of weights, bias and powers.
void* decode_new(const int64_t* sizes, const float* scales, const int64_t* parts) {
  using namespace octavo;
  auto made = std::make_unique<Decoder>();
  std::copy_n(sizes, sizeof(Sizes) / sizeof(int64_t), reinterpret_cast<int64_t*>(&made->s));
  std::copy_n(scales, sizeof(Scales) / sizeof(float), reinterpret_cast<float*>(&made->scales));
  made->embedding = reinterpret_cast<const void*>(*parts++);
  made->norm = floats(parts);
  made->head = matrix(parts);
  for (int64_t i = 0; i < made->s.n_layers; ++i) {
    Layer l;
    l.norm_mixer = floats(parts), l.norm_channel = floats(parts), l.mixer_out = floats(parts);
    l.channel_out = floats(parts), l.q_norm = floats(parts), l.k_norm = floats(parts);
    l.window = *parts++, l.turn = *parts++;
    l.qkv = matrix(parts), l.o = matrix(parts), l.up = matrix(parts), l.down = matrix(parts);
    made->layers.push_back(l);
  }
  return made.release();
}

// Whether bf16 weights are to be packed as fp16.
int decode_fp16() { return octavo::kMultipliesFp16; }

// A number that says what n bytes are.
uint64_t decode_print(const uint8_t* p, int64_t n) {
  using namespace octavo;
  constexpr uint32_t kOdd = 0x9e3779b1u;
  Words state[4] = {};
  int64_t i = 0;
  const auto mix = [](Words s, Words x) { return (s ^ x ^ (s >> 15)) * kOdd + 1u; };
  for (; i + 256 <= n; i += 256)
    for (int j = 0; j < 4; ++j) {
      Words x;
      std::memcpy(&x, p + i + 64 * j, sizeof x);
      state[j] = mix(state[j], x);
    }
  for (; i < n; ++i) state[i % 4][i / 4 % kLanes] = (state[i % 4][i / 4 % kLanes] ^ p[i]) * kOdd + 1u;
  uint64_t total = uint64_t(n);
  for (const Words& words : state)
    for (int j = 0; j < kLanes; ++j) total = (total ^ words[j] ^ (total >> 29)) * 0x9e3779b97f4a7c15u + 1u;
  return total;
}

// Reads n bytes with the team, and does nothing with them: what there is to reach.
uint64_t decode_read(const uint8_t* p, int64_t n, int threads) {
  using namespace octavo;
  std::atomic<uint32_t> total{0};
  Counter counter;
  constexpr int64_t kPiece = 1 << 16, kAhead = 8192;  // bytes taken at once, and asked for before they are read
  on_team(threads, [&](Team&, int) {
    Words sum = {};
    for (int64_t i; (i = counter.take() * kPiece) < n;)
      for (int64_t j = i; j + 64 <= std::min(n, i + kPiece); j += 64) {
        __builtin_prefetch(p + j + kAhead);
        sum ^= *reinterpret_cast<const Words*>(p + j);
      }
    total ^= sum[0] ^ sum[7];
  });
  return total;
}

void decode_free(void* decoder) { delete static_cast<octavo::Decoder*>(decoder); }

// counts: N, n_wanted, n_max, block_size, n_positions, n_sequences, n_blocks, n_rows of rings, entries behind the rings of
// each layer, whether the pools hold bf16, threads. numbers: tokens, sequence, slots, positions, first, rows, docs (N each). memory: of each layer the five
// of Memory. Returns 0, or which number is refused.
int decode_step(void* decoder, const int64_t* counts, const int64_t* numbers, const int64_t* wanted,
                const int32_t* tables, const float* turns, const void* memory, float* logits) {
  using namespace octavo;
  auto& own = *static_cast<Decoder*>(decoder);
  const int64_t N = counts[0];
  const Memory* layers = static_cast<const Memory*>(memory);
  Request r = {N, counts[1], counts[2], counts[3], counts[4], numbers, numbers + N, numbers + 2 * N,
                     numbers + 3 * N, numbers + 4 * N, numbers + 5 * N, numbers + 6 * N, wanted, tables, turns, layers,
                     logits, counts[7], nullptr};
  const bool blocks = std::any_of(layers, layers + own.s.n_layers, [](const Memory& m) { return m.ring == 0; });
  if (const int why = refused(r, own.s.V, counts[5], counts[6], blocks)) return why;
  std::vector<int64_t> begins(r.n_rows ? size_t(N) : 0);
  if (r.n_rows && !ordered(r, begins.data())) return 8;
  for (int64_t m = 0; m < int64_t(begins.size()); ++m)
    if (begins[size_t(m)] < m) r.begins = begins.data();
  if (r.begins && counts[8] < N) return 8;
  if (N > 0) own.step(r, counts[9] != 0, int(counts[10]));
  return 0;
}
}
