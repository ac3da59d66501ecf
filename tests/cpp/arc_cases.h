// Which problems do the tests of ARC run, and what is right for each? As adapter_cases.h, whose chance, buffers, sums
// and bounds these are.
#pragma once

#include "adapter_cases.h"
#include "common/arc.h"

namespace vitadapter::test {

struct ArcCase {
  CaseOptions options;  // of which ARC has no more than make_arc_case reads
  int64_t seed = 0;
  Buffer x, basis, rescale, bias, grad;
  ArcForward forward;    // without outputs
  ArcBackward backward;  // without hidden and outputs
};

// `rescale_spread`: a model starts at 0, and its first steps are tiny. The basis has up's dtype, rescale down's, and
// the bias up_bias's.
inline std::unique_ptr<ArcCase> make_arc_case(const CaseOptions& o, double rescale_spread) {
  auto c = std::make_unique<ArcCase>();
  c->options = o;
  c->seed = int64_t(generator());
  auto numbers = [&](DType dtype, int64_t count, double spread = 1) {
    return o.whole_numbers ? Buffer::whole(dtype, count, o.odd_addresses)
                           : Buffer::random(dtype, count, o.odd_addresses, spread);
  };
  c->x = numbers(o.x, o.rows * o.dim);
  c->basis = numbers(o.up, o.dim * o.rank, 1 / std::sqrt(double(o.dim)));
  c->rescale = numbers(o.down, o.rank, rescale_spread);
  if (o.up_bias) c->bias = numbers(*o.up_bias, o.dim);
  c->grad = numbers(o.x, o.rows * o.dim);

  ArcProblem p;
  p.rows = o.rows;
  p.dim = o.dim;
  p.rank = o.rank;
  p.x = c->x.operand();
  p.basis = c->basis.operand();
  p.rescale = c->rescale.operand();
  p.dropout = {&c->seed, Stream::kDropout, o.dropout};
  p.compute = o.compute;
  p.allow_tf32 = o.allow_tf32;
  static_cast<ArcProblem&>(c->forward) = p;
  static_cast<ArcProblem&>(c->backward) = p;
  c->forward.bias = c->bias.operand();
  c->backward.grad = c->grad.operand();
  return c;
}

// Which gradients are asked for: the bits of the op.
enum ArcNeeds { kArcXGrad = 1, kBasisGrad = 2, kRescaleGrad = 4, kBiasGrad = 8, kAllArcGrads = 15 };

// Everything an implementation writes; absent ones have no bytes.
struct ArcOutputs {
  Buffer hidden, y, x_grad, basis_grad, rescale_grad, bias_grad;

  ArcOutputs(const ArcCase& c, int needs) {
    const DType wide = c.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    auto make = [&](DType dtype, int64_t count) { return Buffer::poisoned(dtype, count, c.options.odd_addresses); };
    hidden = make(wide, c.forward.rows * c.forward.rank);
    y = make(c.x.dtype, c.x.count);
    auto like = [&](ArcNeeds need, const Buffer& of, Buffer& out) {
      if (of.bytes && (needs & need)) out = make(of.dtype, of.count);
    };
    like(kArcXGrad, c.x, x_grad);
    like(kBasisGrad, c.basis, basis_grad);
    like(kRescaleGrad, c.rescale, rescale_grad);
    like(kBiasGrad, c.bias, bias_grad);
  }
  ArcForward forward(const ArcCase& c) {
    ArcForward p = c.forward;
    p.y = y.result();
    p.hidden = hidden.bytes;
    return p;
  }
  ArcBackward backward(const ArcCase& c) {
    ArcBackward p = c.backward;
    p.hidden = hidden.bytes;
    p.x_grad = x_grad.result();
    p.basis_grad = basis_grad.result();
    p.rescale_grad = rescale_grad.result();
    p.bias_grad = bias_grad.result();
    return p;
  }
  std::vector<std::pair<const char*, const Buffer*>> all() const {
    return {{"hidden", &hidden},
            {"y", &y},
            {"x_grad", &x_grad},
            {"basis_grad", &basis_grad},
            {"rescale_grad", &rescale_grad},
            {"bias_grad", &bias_grad}};
  }
};

// What the definition in csrc/common/arc.h says, output by output in the order of ArcOutputs::all(). A kernel may round
// the basis before it meets rescale or after that, and, with `rounds_middle`, z and gh; with `rounds_rescaled`, gh once
// more when it has met rescale.
VA_UNSANITIZED inline Exact exact(const ArcCase& c, Precision precision, bool rounds_middle,
                                  bool rounds_rescaled = false) {
  const ArcForward& p = c.forward;
  const int64_t rows = p.rows, dim = p.dim, rank = p.rank;
  enum { kHidden, kY, kX, kBasis, kRescale, kBias };
  Exact e;
  for (int64_t size : {rows * rank, rows * dim, rows * dim, dim * rank, rank, dim}) e.emplace_back(size);
  auto operands = [&](const Buffer& b) {
    Doubles values(b.count);
    for (int64_t i = 0; i < b.count; ++i) values[i] = round_to(b.at(i), precision);
    return values;
  };
  const Doubles x = operands(c.x), basis = operands(c.basis), grad = operands(c.grad);
  const bool narrow = precision != Precision::kFloat32 && precision != Precision::kFloat64;
  Doubles scaled(dim * rank), scaled_doubt(dim * rank), basis_doubt(dim * rank);
  for (int64_t i = 0; i < dim * rank; ++i) {
    const double rescale = c.rescale.at(i % rank);
    scaled[i] = rescale * c.basis.at(i);
    if (!narrow) continue;
    basis_doubt[i] = std::abs(basis[i] - c.basis.at(i));
    scaled_doubt[i] = std::max(std::abs(rescale) * basis_doubt[i],
                               doubt_of(scaled[i], scaled[i], 1e-6 * std::abs(scaled[i]), precision));
  }
  auto rounded_middle = [&](Sum sum) {
    if (rounds_middle) {
      sum.doubt = doubt_of(sum.value, sum.value, sum.doubt + sum_error(p.x.dtype, sum.magnitude), precision);
    }
    return sum;
  };
  std::vector<Sum> z(rank), gh(rank), rescaled(rank), product(rank * dim);  // product: G
  for (int64_t n = 0; n < rows; ++n) {
    const double *const x_n = x.data() + n * dim, *const g_n = grad.data() + n * dim;
    for (int64_t j = 0; j < rank; ++j) {
      Sum hidden, gz;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t i = d * rank + j;
        hidden.add(x_n[d] * scaled[i], std::abs(x_n[d]) * scaled_doubt[i]);
        gz.add(g_n[d] * basis[i]);
      }
      e[kHidden][n * rank + j] = hidden;
      const double mask = p.dropout.at<double>(n, j);
      z[j] = gh[j] = {};
      z[j].add_times(mask, 0, hidden);
      gh[j].add_times(mask, 0, gz);
      z[j] = rounded_middle(z[j]);
      gh[j] = rounded_middle(gh[j]);
      rescaled[j] = {};
      rescaled[j].add_times(c.rescale.at(j), 0, gh[j]);
      rescaled[j] = rounded_middle(rescaled[j]);
    }
    for (int64_t d = 0; d < dim; ++d) {
      Sum &y = e[kY][n * dim + d], &gx = e[kX][n * dim + d];
      const double g = c.grad.at(n * dim + d);
      y.add(c.x.at(n * dim + d));
      if (c.bias.bytes) y.add(c.bias.at(d));
      gx.add(g);
      e[kBias][d].add(g);
      for (int64_t j = 0; j < rank; ++j) {
        const int64_t i = d * rank + j;
        y.add_times(basis[i], 0, z[j]);
        rounds_rescaled ? gx.add_times(basis[i], 0, rescaled[j]) : gx.add_times(scaled[i], scaled_doubt[i], gh[j]);
        e[kBasis][i].add_times(g_n[d], 0, z[j]);
        product[i].add_times(x_n[d], 0, gh[j]);
      }
    }
  }
  for (int64_t i = 0; i < dim * rank; ++i) {
    e[kBasis][i].add_times(c.rescale.at(i % rank), 0, product[i]);
    e[kRescale][i % rank].add_times(c.basis.at(i), basis_doubt[i], product[i]);
  }
  return e;
}

}  // namespace vitadapter::test
