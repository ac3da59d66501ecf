// The portable CPU kernels of the consolidator op: standard C++, any processor, any shape, every dtype.
//
// Idea: a row is read once as it lies, and each output gathers its group's places through a table. Everything between
// is float64, which the gathering hides. Weight gradients: the rows are cut into chunks whose bounds depend on the
// shape and on which gradients are asked for; each chunk has its own sums, and the chunks are added in order. So the
// bits do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "consolidator.h"
#include "elements.h"

namespace vitadapter::cpu {
namespace {

using Doubles = std::vector<double>;

// A chunk has sums of its own, so it must have rows enough to pay for adding them up.
constexpr int64_t kChunkRows = 64;

// A branch as it is worked with: its weights as operands, and where its places read x.
struct Branch {
  int64_t group_in, group_out;
  Doubles weight, bias;  // bias: zeros where there is none
  std::vector<int64_t> source;

  Branch(const ConsolidatorBranch& b, int64_t in, int64_t out, bool shuffle)
      : group_in(b.group_in), group_out(b.group_out), weight(out * b.group_in), bias(out), source(in) {
    read(b.weight, 0, int64_t(weight.size()), weight.data());
    if (b.bias.data) read(b.bias, 0, out, bias.data());
    for (int64_t place = 0; place < in; ++place) source[place] = b.source(place, shuffle);
  }
  // The elements of x that an output reads, group_in of them.
  const int64_t* sources(int64_t output) const { return source.data() + output / group_out * group_in; }
};

template <typename Problem>
std::vector<Branch> read_branches(const Problem& p) {
  std::vector<Branch> branches;
  for (int i = 0; i < p.branches; ++i) branches.emplace_back(p.branch[i], p.in, p.out, p.shuffle);
  return branches;
}

void round_all(Doubles& values, DType compute) {
  for (double& value : values) value = rounded(value, compute);
}

std::vector<Branch> read_operands(const ConsolidatorProblem& p) {
  std::vector<Branch> branches = read_branches(p);
  for (Branch& branch : branches) round_all(branch.weight, p.compute);
  return branches;
}

}  // namespace

void consolidator_forward_portable(const ConsolidatorForward& p, ParallelFor parallel_for) {
  const std::vector<Branch> branches = read_operands(p);
  for_ranges(parallel_for, p.rows, 8, [&](int64_t begin, int64_t end) {
    Doubles x(p.in), y(p.out);
    for (int64_t row = begin; row < end; ++row) {
      read(p.x, row * p.in, p.in, x.data());
      round_all(x, p.compute);
      p.base.data ? read(p.base, row * p.out, p.out, y.data()) : std::fill(y.begin(), y.end(), 0.0);
      for (int i = 0; i < p.branches; ++i) {
        const Branch& b = branches[i];
        const double keep = p.keep<double>(row, i);
        for (int64_t o = 0; o < p.out; ++o) {
          const int64_t* const sources = b.sources(o);
          double sum = b.bias[o];
          for (int64_t s = 0; s < b.group_in; ++s) sum += b.weight[o * b.group_in + s] * x[sources[s]];
          y[o] += keep * sum;
        }
      }
      write(p.y, row * p.out, p.out, y.data());
    }
  });
}

namespace {

// What one chunk of rows adds to the gradients of the parameters.
struct Sums {
  std::vector<Doubles> weight, bias;
  Doubles grad;

  explicit Sums(const ConsolidatorBackward& p) : grad(p.grad_sum.data ? p.out : 0) {
    for (int i = 0; i < p.branches; ++i) {
      weight.emplace_back(p.weight_grad[i].data ? p.out * p.branch[i].group_in : 0);
      bias.emplace_back(p.bias_grad[i].data ? p.out : 0);
    }
  }
  int64_t bytes() const {
    size_t count = grad.size();
    for (size_t i = 0; i < weight.size(); ++i) count += weight[i].size() + bias[i].size();
    return int64_t(count * sizeof(double));
  }
  void add(const Sums& other) {
    const auto add_to = [](Doubles& sums, const Doubles& values) {
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
    };
    for (size_t i = 0; i < weight.size(); ++i) {
      add_to(weight[i], other.weight[i]);
      add_to(bias[i], other.bias[i]);
    }
    add_to(grad, other.grad);
  }
};

void add_chunk(const ConsolidatorBackward& p, const std::vector<Branch>& branches, int64_t begin, int64_t end,
               Sums& sums) {
  const bool needs_x = std::any_of(p.weight_grad, p.weight_grad + p.branches, [](Result each) { return each.data; });
  const bool needs_gx = p.x_grad.data;
  Doubles x(p.in), g(p.out), gx(p.in);
  for (int64_t row = begin; row < end; ++row) {
    if (needs_x) {
      read(p.x, row * p.in, p.in, x.data());
      round_all(x, p.compute);
    }
    read(p.grad, row * p.out, p.out, g.data());
    round_all(g, p.compute);
    if (needs_gx && p.x_grad_base.data) {
      read(p.x_grad_base, row * p.in, p.in, gx.data());
    } else if (needs_gx) {
      std::fill(gx.begin(), gx.end(), 0.0);
    }
    for (int64_t o = 0; o < int64_t(sums.grad.size()); ++o) sums.grad[o] += g[o];
    for (int i = 0; i < p.branches; ++i) {
      const Branch& b = branches[i];
      const double keep = p.keep<double>(row, i);
      for (int64_t o = 0; o < p.out; ++o) {
        const int64_t* const sources = b.sources(o);
        const double* const weight = b.weight.data() + o * b.group_in;
        const double kept = keep * g[o];
        if (!sums.bias[i].empty()) sums.bias[i][o] += kept;
        for (int64_t s = 0; needs_gx && s < b.group_in; ++s) gx[sources[s]] += kept * weight[s];
        if (sums.weight[i].empty()) continue;
        for (int64_t s = 0; s < b.group_in; ++s) sums.weight[i][o * b.group_in + s] += kept * x[sources[s]];
      }
    }
    if (needs_gx) write(p.x_grad, row * p.in, p.in, gx.data());
  }
}

}  // namespace

void consolidator_backward_portable(const ConsolidatorBackward& p, ParallelFor parallel_for) {
  const std::vector<Branch> branches = read_operands(p);
  const Sums zeros(p);
  const int64_t most_chunks = std::clamp<int64_t>(kSumsBytes / std::max<int64_t>(zeros.bytes(), 1), 1, kMostChunks);
  const int64_t chunk_rows = std::max(kChunkRows, (p.rows + most_chunks - 1) / most_chunks);
  const int64_t chunks = std::max<int64_t>((p.rows + chunk_rows - 1) / chunk_rows, 1);
  std::vector<Sums> sums(chunks, zeros);
  for_ranges(parallel_for, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      add_chunk(p, branches, chunk * chunk_rows, std::min(p.rows, (chunk + 1) * chunk_rows), sums[chunk]);
    }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) sums[0].add(sums[chunk]);
  for (int i = 0; i < p.branches; ++i) {
    const Doubles &weight = sums[0].weight[i], &bias = sums[0].bias[i];
    if (!weight.empty()) write(p.weight_grad[i], 0, int64_t(weight.size()), weight.data());
    if (!bias.empty()) write(p.bias_grad[i], 0, p.out, bias.data());
  }
  if (p.grad_sum.data) write(p.grad_sum, 0, p.out, sums[0].grad.data());
}

void consolidator_weight_portable(const ConsolidatorWeight& p, ParallelFor parallel_for) {
  const std::vector<Branch> branches = read_branches(p);
  for_ranges(parallel_for, p.out, 16, [&](int64_t begin, int64_t end) {
    Doubles row(p.in);
    for (int64_t o = begin; o < end; ++o) {
      read(p.weight, o * p.in, p.in, row.data());
      for (const Branch& b : branches) {
        for (int64_t s = 0; s < b.group_in; ++s) row[b.sources(o)[s]] += b.weight[o * b.group_in + s];
      }
      write(p.result, o * p.in, p.in, row.data());
    }
  });
}

}  // namespace vitadapter::cpu
