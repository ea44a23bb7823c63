// Every instruction set's linears and attention against sums in double, over odd sizes; shares of the work at the same
// time give the bits of one thread.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"

const rmt::cpu::Kernels* wide_kernels();

namespace {

using namespace rmt::cpu;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<const Kernels*> all_kernels() {
  auto all = available_kernels();
  all.push_back(wide_kernels());
  return all;
}

std::vector<float> random_floats(size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& value : out) value = normal(engine);
  return out;
}

template <class Args>
void in_shares(void (*kernel)(const Args&, int, int), const Args& args, int parts) {
  std::vector<std::thread> threads;
  for (int part = 1; part < parts; ++part) threads.emplace_back([&, part] { kernel(args, part, parts); });
  kernel(args, 0, parts);
  for (std::thread& thread : threads) thread.join();
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// ---------------------------------------------------------------------------------------------------- linears

struct LinearCase {
  int64_t rows, inputs, outputs;
};

const LinearCase kLinears[] = {{1, 1, 1}, {7, 33, 5}, {13, 400, 44}, {101, 60, 130}, {20, 800, 35}};

struct LinearData {
  LinearCase size;
  std::vector<float> x, weight, bias, norm_weight, norm_bias, other, packed;

  explicit LinearData(LinearCase s)
      : size(s),
        x(random_floats((s.inputs + 3) * s.rows, 1)),
        weight(random_floats(s.outputs * s.inputs, 2)),
        bias(random_floats(s.outputs, 3)),
        norm_weight(random_floats(s.inputs, 4)),
        norm_bias(random_floats(s.inputs, 5)),
        other(random_floats(s.rows * s.outputs, 6)) {}

  LinearArgs args(const Kernels& kernels, NormKind norm, Combine combine, Activation activation) {
    packed.assign((size.outputs + kernels.panel - 1) / kernels.panel * kernels.panel * size.inputs, kNaN);
    kernels.pack(weight.data(), size.outputs, size.inputs, size.inputs, packed.data());
    LinearArgs a{};
    a.x = x.data();
    a.rows = size.rows;
    a.x_stride = size.inputs + 3;
    a.weight = packed.data();
    a.bias = bias.data();
    a.inputs = size.inputs;
    a.outputs = size.outputs;
    a.norm = norm;
    a.norm_weight = norm_weight.data();
    a.norm_bias = norm == NormKind::kLayer ? norm_bias.data() : nullptr;
    a.eps = 1e-5f;
    a.activation = activation;
    a.combine = combine;
    a.other = other.data();
    a.other_stride = size.outputs;
    a.out_stride = size.outputs;
    return a;
  }

  std::vector<double> normalized(int64_t row, NormKind norm) const {
    const float* from = x.data() + row * (size.inputs + 3);
    std::vector<double> out(from, from + size.inputs);
    double mean = 0, square = 0;
    if (norm == NormKind::kLayer) {
      for (double value : out) mean += value / size.inputs;
    }
    for (double value : out) square += (value - mean) * (value - mean) / size.inputs;
    if (norm == NormKind::kNone) return out;
    for (int64_t k = 0; k < size.inputs; ++k) {
      out[k] = (out[k] - mean) / std::sqrt(square + 1e-5) * norm_weight[k];
      if (norm == NormKind::kLayer) out[k] += norm_bias[k];
    }
    return out;
  }
};

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kTanh:
      return std::tanh(x);
  }
  return x;
}

void check_linear(const Kernels& kernels, LinearData& data, NormKind norm, Combine combine, Activation activation) {
  LinearArgs args = data.args(kernels, norm, combine, activation);
  std::vector<float> out(data.size.rows * data.size.outputs, kNaN);
  args.out = out.data();
  kernels.linear(args, 0, 1);
  double worst = 0, greatest = 1e-3;
  for (int64_t r = 0; r < data.size.rows; ++r) {
    const auto x = data.normalized(r, norm);
    for (int64_t n = 0; n < data.size.outputs; ++n) {
      double sum = data.bias[n], size = std::fabs(sum);
      for (int64_t k = 0; k < data.size.inputs; ++k) {
        const double term = x[k] * data.weight[n * data.size.inputs + k];
        sum += term;
        size += std::fabs(term);
      }
      double truth = activated(sum, activation);
      const double other = data.other[r * data.size.outputs + n];
      if (combine == Combine::kAdd) truth += other;
      if (combine == Combine::kMultiply) truth *= other;
      const double scale = combine == Combine::kMultiply ? std::fabs(other) : 1;
      worst = std::max(worst, std::fabs(out[r * data.size.outputs + n] - truth));
      greatest = std::max(greatest, size * scale);
      CHECK(std::isfinite(out[r * data.size.outputs + n]));
    }
  }
  CHECK(worst <= 1e-6 * greatest);
  for (int parts : {2, 3, 7}) {
    std::vector<float> again(out.size(), kNaN);
    args.out = again.data();
    in_shares(kernels.linear, args, parts);
    CHECK(same_bits(out, again));
  }
  for (int64_t r : {int64_t{0}, data.size.rows / 2, data.size.rows - 1}) {  // a row alone
    std::vector<float> alone(data.size.outputs, kNaN);
    LinearArgs one = args;
    one.x += r * one.x_stride;
    one.other += r * one.other_stride;
    one.rows = 1;
    one.out = alone.data();
    kernels.linear(one, 0, 1);
    CHECK(std::memcmp(alone.data(), &out[r * data.size.outputs], alone.size() * sizeof(float)) == 0);
  }
}

// ---------------------------------------------------------------------------------------------------- attention

struct AttentionCase {
  int64_t batch, keys, heads, kv_heads, head_dim;
  bool causal;
};

const AttentionCase kAttentions[] = {
    {1, 1, 1, 1, 2, true},  {2, 100, 4, 4, 60, true}, {1, 33, 6, 2, 10, false},
    {3, 16, 4, 1, 8, true}, {1, 70, 2, 2, 64, true},  {2, 37, 3, 3, 17, false},
};

struct AttentionData {
  AttentionCase size;
  std::vector<float> q, k, v;

  explicit AttentionData(AttentionCase s)
      : size(s),
        q(random_floats(s.batch * s.keys * s.heads * s.head_dim, 1)),
        k(random_floats(s.batch * s.keys * s.kv_heads * s.head_dim, 2)),
        v(random_floats(s.batch * s.keys * s.kv_heads * s.head_dim, 3)) {}

  AttentionArgs args(int64_t start, int64_t rows, const std::vector<int32_t>& lengths) const {
    AttentionArgs a{};
    a.storage = Storage::kFloat32;
    a.batch = size.batch;
    a.rows = rows;
    a.heads = size.heads;
    a.kv_heads = size.kv_heads;
    a.head_dim = size.head_dim;
    a.q_row = size.heads * size.head_dim;
    a.q_batch = size.keys * a.q_row;
    a.q = q.data() + start * a.q_row;
    a.k_head = a.v_head = size.head_dim;
    a.k_row = a.v_row = size.kv_heads * size.head_dim;
    a.k_batch = a.v_batch = size.keys * a.k_row;
    a.k = k.data();
    a.v = v.data();
    a.past = {nullptr, 0};
    a.start = {nullptr, start};
    a.length = {lengths.data(), 0};
    a.causal = size.causal;
    a.scale = 0.3f;
    return a;
  }

  double truth(int64_t slot, int64_t head, int64_t row, int64_t d, int64_t length) const {
    const int64_t kv = head / (size.heads / size.kv_heads), seen = size.causal ? std::min(length, row + 1) : length;
    const float* query = &q[(slot * size.keys + row) * size.heads * size.head_dim + head * size.head_dim];
    std::vector<double> scores;
    double most = -1e300, total = 0, out = 0;
    for (int64_t j = 0; j < seen; ++j) {
      const float* key = &k[(slot * size.keys + j) * size.kv_heads * size.head_dim + kv * size.head_dim];
      double score = 0;
      for (int64_t i = 0; i < size.head_dim; ++i) score += 0.3 * query[i] * key[i];
      scores.push_back(score);
      most = std::max(most, score);
    }
    for (int64_t j = 0; j < seen; ++j) {
      const double weight = std::exp(scores[j] - most);
      total += weight;
      out += weight * v[(slot * size.keys + j) * size.kv_heads * size.head_dim + kv * size.head_dim + d];
    }
    return out / total;
  }
};

void check_attention(const Kernels& kernels, AttentionData data) {
  const AttentionCase& size = data.size;
  std::vector<int32_t> lengths;
  for (int64_t slot = 0; slot < size.batch; ++slot) lengths.push_back(static_cast<int32_t>(size.keys - slot * 3));
  const int64_t width = size.heads * size.head_dim, kv_width = size.kv_heads * size.head_dim;
  for (int64_t slot = 0; slot < size.batch; ++slot) {  // what stands behind a slot's length may be anything
    for (int64_t at = (slot * size.keys + lengths[slot]) * kv_width; at < (slot + 1) * size.keys * kv_width; ++at) {
      data.k[at] = data.v[at] = kNaN;
    }
  }
  std::vector<float> out(size.batch * size.keys * width, kNaN);
  AttentionArgs args = data.args(0, size.keys, lengths);
  args.out = out.data();
  kernels.attention(args, 0, 1);
  for (int64_t slot = 0; slot < size.batch; ++slot) {
    for (int64_t row = 0; row < lengths[slot]; ++row) {
      for (int64_t i = row % 5; i < width; i += 5) {  // the sums in double are slow
        const double truth = data.truth(slot, i / size.head_dim, row, i % size.head_dim, lengths[slot]);
        CHECK(std::fabs(out[(slot * size.keys + row) * width + i] - truth) <= 5e-6);
      }
    }
  }
  for (int parts : {2, 3, 5}) {
    std::vector<float> again(out.size(), kNaN);
    args.out = again.data();
    in_shares(kernels.attention, args, parts);
    CHECK(same_bits(out, again));
  }
  const int64_t start = size.keys / 2;  // a window of the query rows
  std::vector<float> window(size.batch * (size.keys - start) * width, kNaN);
  AttentionArgs part = data.args(start, size.keys - start, lengths);
  part.out = window.data();
  kernels.attention(part, 0, 1);
  for (int64_t slot = 0; slot < size.batch; ++slot) {
    const float* whole = &out[(slot * size.keys + start) * width];
    const size_t bytes = static_cast<size_t>((lengths[slot] - start) * width) * sizeof(float);
    if (lengths[slot] > start) CHECK(std::memcmp(whole, &window[slot * (size.keys - start) * width], bytes) == 0);
  }
}

}  // namespace

TEST("cpu linear: norms, activations and combinations against sums in double") {
  for (const Kernels* kernels : all_kernels()) {
    for (const LinearCase size : kLinears) {
      LinearData data(size);
      int turn = 0;
      for (const NormKind norm : {NormKind::kNone, NormKind::kLayer, NormKind::kRms}) {
        for (int activation = 0; activation <= static_cast<int>(Activation::kTanh); ++activation) {
          const auto combine = static_cast<Combine>(turn++ % 3);
          check_linear(*kernels, data, norm, combine, static_cast<Activation>(activation));
        }
      }
    }
  }
}

TEST("cpu linear: what is not finite stays so") {
  for (const Kernels* kernels : all_kernels()) {
    LinearData data({3, 20, 17});
    data.x[5] = kNaN;
    for (int activation = 0; activation <= static_cast<int>(Activation::kTanh); ++activation) {
      LinearArgs args = data.args(*kernels, NormKind::kNone, Combine::kNone, static_cast<Activation>(activation));
      std::vector<float> out(3 * 17, 0.0f);
      args.out = out.data();
      kernels->linear(args, 0, 1);
      for (int n = 0; n < 17; ++n) CHECK(std::isnan(out[n]) && std::isfinite(out[17 + n]));
    }
  }
}

TEST("cpu attention: lengths, windows and groups against sums in double") {
  for (const Kernels* kernels : all_kernels()) {
    for (const AttentionCase& size : kAttentions) check_attention(*kernels, AttentionData(size));
  }
}

TEST("cpu attention: a cache holds what was appended, and gives the same rows") {
  for (const Kernels* kernels : all_kernels()) {
    const AttentionData data({2, 20, 4, 2, 12, true});
    const int64_t room = 25, width = 4 * 12;
    const std::vector<int32_t> lengths{20, 20};
    std::vector<float> whole(2 * 20 * width, kNaN), last(2 * width, kNaN);
    AttentionArgs args = data.args(0, 20, lengths);
    args.out = whole.data();
    kernels->attention(args, 0, 1);
    std::vector<float> keys(2 * 2 * room * 12, kNaN), values = keys;
    const std::vector<int32_t> before{0, 0}, firsts{19, 19}, one{1, 1};
    AppendArgs append{};
    append.storage = Storage::kFloat32;
    append.batch = 2;
    append.kv_heads = 2;
    append.head_dim = 12;
    append.k = data.k.data();
    append.v = data.v.data();
    append.k_batch = append.v_batch = 20 * 24;
    append.k_row = append.v_row = 24;
    append.keys = keys.data();
    append.values = values.data();
    append.keys_batch = append.values_batch = 2 * room * 12;
    append.keys_head = append.values_head = room * 12;
    append.keys_row = append.values_row = 12;
    append.past = {before.data(), 0};
    append.length = {firsts.data(), 0};
    in_shares(kernels->append, append, 3);
    append.k = data.k.data() + 19 * 24;
    append.v = data.v.data() + 19 * 24;
    append.past = {firsts.data(), 0};
    append.length = {one.data(), 0};
    in_shares(kernels->append, append, 2);
    AttentionArgs step = data.args(19, 1, one);
    step.past = {firsts.data(), 0};
    step.start = {nullptr, 0};
    step.k = keys.data();
    step.v = values.data();
    step.k_batch = step.v_batch = 2 * room * 12;
    step.k_head = step.v_head = room * 12;
    step.k_row = step.v_row = 12;
    step.out = last.data();
    kernels->attention(step, 0, 1);
    for (int slot = 0; slot < 2; ++slot) {
      CHECK(std::memcmp(&last[slot * width], &whole[(slot * 20 + 19) * width], width * sizeof(float)) == 0);
    }
    CHECK(std::isnan(keys[20 * 12]) && std::isnan(values[20 * 12]));
  }
}

TEST("cpu dispatch: names, and what cannot run here") {
  CHECK(available_kernels().back()->name == std::string("portable"));
  CHECK(&choose_kernels("auto") == available_kernels().front());
  CHECK(&choose_kernels("portable") == available_kernels().back());
  CHECK_THROWS(std::invalid_argument, "expected one of auto, ", choose_kernels("sse9"));
}

TEST("cpu parallel: every share runs once, without torch on the caller's thread") {
  std::vector<int> seen(5, 0);
  run_shares(5, [](void* all, int part, int parts) { (*static_cast<std::vector<int>*>(all))[part] += parts; }, &seen);
  CHECK(seen == std::vector<int>(5, 5));
  CHECK(std::string(pool_name()).empty());
}
