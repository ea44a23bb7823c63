// The kernels, once for each instruction set: a file defines RMT_TARGET, RMT_LANES and RMT_ROWS, turns the instruction
// set on and includes this. Everything but the table is local to that file, so that no other can end up with its code.
//
// All of them rest on `multiply`: a tile of kRows × kPanel sums in registers, over the columns of a few rows and one
// panel of the other side. One sum is one chain of fused multiply-adds in the order of the columns, whatever stands in
// the rest of the tile: that is why a row's bits depend on nothing but the row.

#include <stdlib.h>

#include "kernels.hpp"

#define RMT_UNROLL _Pragma("GCC unroll 16")  // tiles live in registers

namespace rmt::cpu {
namespace {

#include "vector.hpp"

constexpr int64_t kRows = RMT_ROWS;
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kDepth = 384;         // columns of a step: so many rows of a panel stay in the first-level cache
constexpr int64_t kBlock = 16 * kRows;  // rows of x that share one pass over the weights
constexpr int64_t kSpare = 16;          // keeps rows from lying a multiple of 4096 bytes apart

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory of one thread, kept for its next call.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  float* floats(int64_t count) {
    if (count > room_) {
      free(data_);
      room_ = pieces(count, 1024) * 1024;
      data_ = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(room_) * sizeof(float)));
      if (!data_) abort();  // a thread of the pool has nobody to tell
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t room_ = 0;
};

thread_local Scratch scratch;

// A vector of the first `count` of up to kLanes floats, zeros behind them; and back.
inline Vec load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load_vec(from);
  Vec some = {};
  for (int64_t i = 0; i < kLanes; ++i) {
    if (i < count) some[i] = from[i];
  }
  return some;
}

inline void store_some(float* to, Vec value, int64_t count) {
  if (count >= kLanes) return store_vec(to, value);
  for (int64_t i = 0; i < kLanes; ++i) {
    if (i < count) to[i] = value[i];
  }
}

template <int64_t R>
struct Tile {
  Vec sums[R][2];

  void clear() { RMT_UNROLL for (int64_t r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec{}; }

  // The first `width` columns of rows that lie a stride apart.
  void load(const float* from, int64_t stride, int64_t width) {
    RMT_UNROLL for (int64_t r = 0; r < R; ++r, from += stride) {
      sums[r][0] = load_some(from, width);
      sums[r][1] = load_some(from + kLanes, width - kLanes);
    }
  }

  void store(float* to, int64_t stride, int64_t width) const {
    RMT_UNROLL for (int64_t r = 0; r < R; ++r, to += stride) {
      store_some(to, sums[r][0], width);
      store_some(to + kLanes, sums[r][1], width - kLanes);
    }
  }

  template <class F>
  void apply(F&& f) {
    Vec all[R][2];  // a loop over memory: unrolled, six activations of every tile would be most of this file
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) all[r][0] = sums[r][0], all[r][1] = sums[r][1];
#pragma GCC unroll 1
    for (int64_t r = 0; r < R; ++r) all[r][0] = f(all[r][0]), all[r][1] = f(all[r][1]);
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) sums[r][0] = all[r][0], sums[r][1] = all[r][1];
  }

  void scale(const float* factors) {
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) sums[r][0] *= factors[r], sums[r][1] *= factors[r];
  }

  // += a [R, depth] · b [depth, kPanel]; element (r, k) of a is a[r · a_row + k · a_column]
  void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t depth) {
    Vec kept[R][2];
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) kept[r][0] = sums[r][0], kept[r][1] = sums[r][1];
    for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_row) {
      const Vec left = load_vec(b), right = load_vec(b + kLanes);
      RMT_UNROLL for (int64_t r = 0; r < R; ++r) {
        const Vec value = splat(a[r * a_row]);
        kept[r][0] += value * left;
        kept[r][1] += value * right;
      }
    }
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) sums[r][0] = kept[r][0], sums[r][1] = kept[r][1];
  }
};

template <int64_t R, class F>
inline int64_t as_tile(F&& f) {
  Tile<R> tile;
  f(tile);
  return R;
}

// Calls f with the greatest Tile of at most `rows` rows, and returns how many those are. A few sizes, not all: each is
// compiled anew wherever it is used.
template <class F>
inline int64_t with_tile(int64_t rows, F&& f) {
  if (rows >= kRows) return as_tile<kRows>(f);
  if constexpr (kRows > 8) {
    if (rows >= 8) return as_tile<8>(f);
  }
  if (rows >= 4) return as_tile<4>(f);
  return rows >= 2 ? as_tile<2>(f) : as_tile<1>(f);
}

// ------------------------------------------------------------------------------------------------------- linear

void pack(const float* weight, int64_t outputs, int64_t inputs, int64_t stride, float* packed) {
  for (int64_t first = 0; first < outputs; first += kPanel) {
    for (int64_t k = 0; k < inputs; ++k) {
      for (int64_t i = 0; i < kPanel; ++i) {
        *packed++ = first + i < outputs ? weight[(first + i) * stride + k] : 0.0f;
      }
    }
  }
}

struct RowNorm {
  float mean = 0, scale = 1;
};

RowNorm norm_of(const LinearArgs& args, const float* x) {
  RowNorm norm;
  if (args.norm == NormKind::kNone) return norm;
  const int64_t count = args.inputs;
  Vec total{};
  if (args.norm == NormKind::kLayer) {
    for (int64_t k = 0; k < count; k += kLanes) total += load_some(x + k, count - k);
    norm.mean = sum(total) / static_cast<float>(count);
    total = Vec{};
  }
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec off = load_some(x + k, count - k) - norm.mean;
    if (count - k < kLanes) {
      float all[kLanes] = {};
      store_some(all, off, count - k);
      off = load_vec(all);
    }
    total += off * off;
  }
  norm.scale = 1.0f / __builtin_sqrtf(sum(total) / static_cast<float>(count) + args.eps);
  return norm;
}

// Columns [from, from + count) of one row of x, normalized.
void copy_row(const LinearArgs& args, const float* x, RowNorm norm, int64_t from, int64_t count, float* to) {
  const bool plain = args.norm == NormKind::kNone;
  for (int64_t k = 0; k < count; k += kLanes) {
    const int64_t here = count - k;
    Vec value = load_some(x + from + k, here);
    if (!plain) {
      value = (value - norm.mean) * norm.scale * load_some(args.norm_weight + from + k, here);
      if (args.norm_bias) value += load_some(args.norm_bias + from + k, here);
    }
    store_vec(to + k, value);  // the rows of the copy have room for a whole vector
  }
}

// What follows the sums of a tile: bias, activation, `other`. `row` and `column` are the tile's first.
template <int64_t R>
void finish(const LinearArgs& args, Tile<R>& tile, int64_t row, int64_t column) {
  const int64_t width = args.outputs - column;
  if (args.bias) {
    const Vec left = load_some(args.bias + column, width);
    const Vec right = load_some(args.bias + column + kLanes, width - kLanes);
    RMT_UNROLL for (int64_t r = 0; r < R; ++r) tile.sums[r][0] += left, tile.sums[r][1] += right;
  }
  switch (args.activation) {
    case Activation::kNone:
      break;
    case Activation::kGelu:
      tile.apply([](Vec x) { return gelu(x); });
      break;
    case Activation::kGeluTanh:
      tile.apply([](Vec x) { return gelu_tanh(x); });
      break;
    case Activation::kRelu:
      tile.apply([](Vec x) { return x < 0.0f ? Vec{} : x; });
      break;
    case Activation::kSilu:
      tile.apply([](Vec x) { return silu(x); });
      break;
    case Activation::kTanh:
      tile.apply([](Vec x) { return tangent(x); });
      break;
  }
  if (args.combine == Combine::kNone) return;
  Tile<R> other;
  other.load(args.other + row * args.other_stride + column, args.other_stride, width);
  const bool add = args.combine == Combine::kAdd;
  RMT_UNROLL for (int64_t r = 0; r < R; ++r) {
    RMT_UNROLL for (int64_t half = 0; half < 2; ++half) {
      Vec& value = tile.sums[r][half];
      value = add ? value + other.sums[r][half] : value * other.sums[r][half];
    }
  }
}

// A block of rows of x against the panels [panel, last); `copy` holds columns [from, from + depth) of those rows.
void linear_step(const LinearArgs& args, const float* copy, int64_t row, int64_t rows, int64_t panel, int64_t last,
                 int64_t from, int64_t depth) {
  const bool ends = from + depth == args.inputs;
  for (; panel < last; ++panel) {
    const float* weight = args.weight + (panel * args.inputs + from) * kPanel;
    const int64_t column = panel * kPanel, width = args.outputs - column;
    for (int64_t done = 0; done < rows;) {
      float* out = args.out + (row + done) * args.out_stride + column;
      done += with_tile(rows - done, [&](auto& tile) {
        if (from == 0) {
          tile.clear();
        } else {
          tile.load(out, args.out_stride, width);  // the sums so far wait there
        }
        tile.multiply(copy + done * (kDepth + kSpare), kDepth + kSpare, 1, weight, kPanel, depth);
        if (ends) finish(args, tile, row + done, column);
        tile.store(out, args.out_stride, width);
      });
    }
  }
}

// Shares are rows; where there are too few, columns.
void linear(const LinearArgs& args, int part, int parts) {
  const int64_t tiles = pieces(args.rows, kRows), panels = pieces(args.outputs, kPanel);
  const bool by_rows = tiles >= 2 * parts;
  const int64_t begin = by_rows ? tiles * part / parts * kRows : 0;
  const int64_t end = by_rows ? smaller(tiles * (part + 1) / parts * kRows, args.rows) : args.rows;
  const int64_t panel = by_rows ? 0 : panels * part / parts, last = by_rows ? panels : panels * (part + 1) / parts;
  float* copy = scratch.floats(kBlock * (kDepth + kSpare));
  RowNorm norms[kBlock];
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t rows = smaller(end - row, kBlock);
    for (int64_t r = 0; r < rows; ++r) norms[r] = norm_of(args, args.x + (row + r) * args.x_stride);
    for (int64_t from = 0; from < args.inputs; from += kDepth) {
      const int64_t depth = smaller(args.inputs - from, kDepth);
      for (int64_t r = 0; r < rows; ++r) {
        copy_row(args, args.x + (row + r) * args.x_stride, norms[r], from, depth, copy + r * (kDepth + kSpare));
      }
      linear_step(args, copy, row, rows, panel, last, from, depth);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- attention

// One head of one row as fp32, rotated to `position` where there are tables, times `scale`.
template <class T>
void copy_head(const T* from, int64_t head_dim, const float* cos, const float* sin, int64_t position, float scale,
               float* to) {
  if (!cos) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = widen(from[d]) * scale;
    return;
  }
  const float *c = cos + position * head_dim, *s = sin + position * head_dim;
  const int64_t half = head_dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float first = widen(from[d]), second = widen(from[d + half]);
    to[d] = (first * c[d] - second * s[d]) * scale;
    to[d + half] = (second * c[d + half] + first * s[d + half]) * scale;
  }
}

inline int64_t keys_of(const AttentionArgs& args, int64_t slot) { return args.past.of(slot) + args.length.of(slot); }

// Keys or values of one head as fp32 rows: those of the caller where they are that already, else a copy.
struct HeadRows {
  const float* data;
  int64_t stride;
};

template <class T>
HeadRows head_rows(const T* from, int64_t stride, int64_t count, int64_t head_dim, int64_t width, const float* cos,
                   const float* sin, float* copy) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!cos && head_dim == width) return {from, stride};
  }
  for (int64_t j = 0; j < count; ++j) {
    float* to = copy + j * width;
    copy_head(from + j * stride, head_dim, cos, sin, j, 1.0f, to);
    for (int64_t d = head_dim; d < width; ++d) to[d] = 0;
  }
  return {copy, width};
}

// What one thread works in.
struct Buffers {
  int64_t width;   // head_dim in whole panels
  float* keys;     // [keys, head_dim]
  float* values;   // [keys, width]
  float* row;      // [width]
  float* queries;  // [head_dim, kPanel]
  float* weights;  // [keys, kPanel]
  float* out;      // [kPanel, width]

  Buffers(const AttentionArgs& args, int64_t most_keys) : width(pieces(args.head_dim, kPanel) * kPanel) {
    keys = scratch.floats(most_keys * (2 * width + kPanel) + width * (1 + 2 * kPanel));
    values = keys + most_keys * width;
    row = values + most_keys * width;
    queries = row + width;
    out = queries + width * kPanel;
    weights = out + width * kPanel;
  }
};

// Scores [keys, kPanel] of kPanel query rows -> their softmax's numerators; returns 1 / their sums, one a row. Row i
// sees the keys up to first + i. A sum goes from the first key to the last, so it does not depend on what follows.
struct Shares {
  Vec halves[2];
};

Shares softmax(float* scores, int64_t keys, int64_t first) {
  Mask places[2];
  for (int64_t i = 0; i < kLanes; ++i) {
    places[0][i] = static_cast<int32_t>(i);
    places[1][i] = static_cast<int32_t>(i + kLanes);
  }
  Shares shares;
  for (int64_t half = 0; half < 2; ++half) {
    float* column = scores + half * kLanes;
    Vec most = load_vec(column), total{};
    for (int64_t j = 1; j < keys; ++j) {
      const Vec value = load_vec(column + j * kPanel);
      most = j <= first || places[half] >= static_cast<int32_t>(j - first) ? larger(most, value) : most;
    }
    for (int64_t j = 0; j < keys; ++j) {
      Vec value = exponential(load_vec(column + j * kPanel) - most);
      if (j > first) value = places[half] >= static_cast<int32_t>(j - first) ? value : Vec{};
      store_vec(column + j * kPanel, value);
      total += value;
    }
    shares.halves[half] = 1.0f / total;
  }
  return shares;
}

// `at.queries`, of which the first `count` are rows first, first + 1, …, against keys [0, most) -> at.out.
void attend_panel(const AttentionArgs& args, int64_t first, int64_t count, int64_t most, HeadRows keys, HeadRows values,
                  const Buffers& at) {
  for (int64_t j = 0; j < most;) {
    j += with_tile(most - j, [&](auto& tile) {
      tile.clear();
      tile.multiply(keys.data + j * keys.stride, keys.stride, 1, at.queries, kPanel, args.head_dim);
      tile.store(at.weights + j * kPanel, kPanel, kPanel);
    });
  }
  float shares[kPanel + kRows] = {};  // room for a whole tile
  const Shares found = softmax(at.weights, most, args.causal ? first : most);
  store_vec(shares, found.halves[0]);
  store_vec(shares + kLanes, found.halves[1]);
  for (int64_t i = 0; i < count;) {
    i += with_tile(count - i, [&](auto& tile) {
      for (int64_t d = 0; d < at.width; d += kPanel) {
        tile.clear();
        tile.multiply(at.weights + i, 1, kPanel, values.data + d, values.stride, most);
        tile.scale(shares + i);
        tile.store(at.out + i * at.width + d, at.width, kPanel);
      }
    });
  }
}

// Query rows [row, row + count) of one head, count ≤ kPanel.
template <class T>
void attend_rows(const AttentionArgs& args, int64_t slot, int64_t head, int64_t row, int64_t count, HeadRows keys,
                 HeadRows values, const Buffers& at) {
  const int64_t width = args.head_dim, first = args.past.of(slot) + args.start.of(slot) + row;
  const int64_t all = keys_of(args, slot), most = args.causal ? smaller(all, first + count) : all;
  const T* q = static_cast<const T*>(args.q) + slot * args.q_batch + row * args.q_row + head * width;
  for (int64_t i = 0; i < kPanel; ++i) {
    if (i < count) copy_head(q + i * args.q_row, width, args.cos, args.sin, first + i, args.scale, at.row);
    for (int64_t d = 0; d < width; ++d) at.queries[d * kPanel + i] = i < count ? at.row[d] : 0.0f;
  }
  attend_panel(args, first, count, most, keys, values, at);
  T* out = static_cast<T*>(args.out) + ((slot * args.rows + row) * args.heads + head) * width;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) narrow(at.out[i * at.width + d], out + i * args.heads * width + d);
  }
}

// Shares are (slot, head of the keys); where there are too few, parts of the query rows too.
template <class T>
void attention_of(const AttentionArgs& args, int part, int parts) {
  const int64_t heads = args.batch * args.kv_heads, tiles = pieces(args.rows, kPanel);
  const int64_t cuts = heads >= parts ? 1 : smaller(parts, tiles), group = args.heads / args.kv_heads;
  int64_t most = 0;
  for (int64_t slot = 0; slot < args.batch; ++slot) most = larger(most, keys_of(args, slot));
  const Buffers at(args, most);
  const int64_t items = heads * cuts, width = args.head_dim;
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
    const int64_t slot = item / cuts / args.kv_heads, kv_head = item / cuts % args.kv_heads, cut = item % cuts;
    const int64_t begin = tiles * cut / cuts * kPanel, end = smaller(tiles * (cut + 1) / cuts * kPanel, args.rows);
    const T* k = static_cast<const T*>(args.k) + slot * args.k_batch + kv_head * args.k_head;
    const T* v = static_cast<const T*>(args.v) + slot * args.v_batch + kv_head * args.v_head;
    const int64_t count = keys_of(args, slot);
    const float* cos = args.rotate_keys ? args.cos : nullptr;
    const HeadRows keys = head_rows(k, args.k_row, count, width, width, cos, args.sin, at.keys);
    const HeadRows values = head_rows(v, args.v_row, count, width, at.width, nullptr, nullptr, at.values);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t row = begin; row < end; row += kPanel) {
        attend_rows<T>(args, slot, head, row, smaller(end - row, kPanel), keys, values, at);
      }
    }
  }
}

void attention(const AttentionArgs& args, int part, int parts) {
  switch (args.storage) {
    case Storage::kFloat32:
      return attention_of<float>(args, part, parts);
    case Storage::kBfloat16:
      return attention_of<Bfloat16>(args, part, parts);
    case Storage::kFloat16:
      return attention_of<Float16>(args, part, parts);
  }
}

template <class T>
void append_to(const AppendArgs& args, int part, int parts) {
  const int64_t items = args.batch * args.kv_heads, width = args.head_dim;
  float* row = scratch.floats(width);
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
    const int64_t slot = item / args.kv_heads, head = item % args.kv_heads, first = args.past.of(slot);
    const T* k = static_cast<const T*>(args.k) + slot * args.k_batch + head * width;
    const T* v = static_cast<const T*>(args.v) + slot * args.v_batch + head * width;
    T* keys = static_cast<T*>(args.keys) + slot * args.keys_batch + head * args.keys_head;
    T* values = static_cast<T*>(args.values) + slot * args.values_batch + head * args.values_head;
    for (int64_t r = 0; r < args.length.of(slot); ++r) {
      copy_head(k + r * args.k_row, width, args.cos, args.sin, first + r, 1.0f, row);
      for (int64_t d = 0; d < width; ++d) {
        narrow(row[d], keys + (first + r) * args.keys_row + d);
        values[(first + r) * args.values_row + d] = v[r * args.v_row + d];
      }
    }
  }
}

void append(const AppendArgs& args, int part, int parts) {
  switch (args.storage) {
    case Storage::kFloat32:
      return append_to<float>(args, part, parts);
    case Storage::kBfloat16:
      return append_to<Bfloat16>(args, part, parts);
    case Storage::kFloat16:
      return append_to<Float16>(args, part, parts);
  }
}

#define RMT_TEXT_OF(name) #name
#define RMT_TEXT(name) RMT_TEXT_OF(name)
constexpr Kernels kTable = {RMT_TEXT(RMT_TARGET), kPanel, pack, linear, attention, append};

}  // namespace
}  // namespace rmt::cpu
