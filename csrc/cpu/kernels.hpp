// What a CPU kernel is given, and the table of kernels of one instruction set. Plain data: the files that are compiled
// for an instruction set include this and nothing of the standard library that has code in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmt::cpu {

enum class Storage : int32_t { kFloat32, kBfloat16, kFloat16 };
enum class NormKind : int32_t { kNone, kLayer, kRms };
enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kRelu, kSilu, kTanh };
enum class Combine : int32_t { kNone, kAdd, kMultiply };

// out = act(norm(x) Wᵀ + b), then + other or · other; all fp32. Rows of x, other and out lie a stride apart.
struct LinearArgs {
  const float* x;  // [rows, inputs]
  int64_t rows, x_stride;
  const float* weight;  // as `pack` leaves it
  const float* bias;    // [outputs] or null
  int64_t inputs, outputs;
  NormKind norm;
  const float* norm_weight;  // [inputs]
  const float* norm_bias;    // [inputs] or null
  float eps;
  Activation activation;
  Combine combine;
  const float* other;  // [rows, outputs]
  int64_t other_stride;
  float* out;  // [rows, outputs]
  int64_t out_stride;
};

// One number for every slot, or one of its own for each.
struct Count {
  const int32_t* slots;  // [batch] or null
  int64_t plus;
  int64_t of(int64_t slot) const { return plus + (slots ? slots[slot] : 0); }
};

// softmax(q kᵀ · scale) v. Key j is seen by query row i of a slot if j < keys, and where causal j ≤ first + i.
// Strides in elements; the elements of one head of one row lie side by side.
struct AttentionArgs {
  Storage storage;  // of q, k, v and out
  const void *q, *k, *v;
  void* out;  // [batch, rows, heads · head_dim], contiguous
  int64_t batch, rows, heads, kv_heads, head_dim;
  int64_t q_batch, q_row;          // head h of a row begins at h · head_dim
  int64_t k_batch, k_head, k_row;  // a cache [B, H_kv, P, D] as well as a projection [B, T, H_kv · D]
  int64_t v_batch, v_head, v_row;
  Count past, start, length;  // keys = past + length; first, the position of query row 0, = past + start
  const float *cos, *sin;     // [P, head_dim], or null
  bool rotate_keys;           // key j stands at position j; those of a cache are rotated already
  bool causal;
  float scale;
};

// The first `length` keys and values of each slot -> a cache, from its row `past` on, the keys rotated.
struct AppendArgs {
  Storage storage;
  const void *k, *v;
  void *keys, *values;
  int64_t batch, kv_heads, head_dim;
  int64_t k_batch, k_row, v_batch, v_row;
  int64_t keys_batch, keys_head, keys_row, values_batch, values_head, values_row;
  Count past, length;
  const float *cos, *sin;  // [P, head_dim], or null
};

// Every kernel does share `part` of `parts`; the shares together are the whole, in any order and at the same time.
// A result's bits do not depend on `parts`, nor a row's on the rows beside it.
struct Kernels {
  const char* name;
  int64_t panel;  // columns of a packed weight that lie together
  // weight [outputs, inputs] with rows a stride apart -> [ceil(outputs / panel), inputs, panel], zeros behind the last
  void (*pack)(const float* weight, int64_t outputs, int64_t inputs, int64_t stride, float* packed);
  void (*linear)(const LinearArgs&, int part, int parts);
  void (*attention)(const AttentionArgs&, int part, int parts);
  void (*append)(const AppendArgs&, int part, int parts);
};

// The instruction sets compiled in; null where the compiler's target is another architecture.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace rmt::cpu
