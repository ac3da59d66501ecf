// Which few rows of choices meet every pair of choices? For tests whose options are too many for all combinations: most
// faults need one option's value, or two options' values together, so every two values of every two options ("factors")
// shall meet in some row. Tens of rows are enough where the full product has hundreds of thousands.
//
// Greedy, as in AETG (Cohen et al., "The AETG system", 1997): each row is the best of a few candidates. A candidate
// starts from a pair that has not met yet, then gives the other factors, in an order drawn at random, the value that
// meets the most new partners in what is chosen already. The rows depend on the arguments alone, on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace vitadapter::test {

// (rows, factors): a value of each factor in each row.
using Rows = std::vector<std::vector<int>>;

// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  // In [0, count), with a bias that is nothing for small counts.
  size_t below(size_t count) { return size_t(next() % count); }

 private:
  uint64_t state_;
};

// Which pairs have met? Values of all factors are counted through: value v of factor f is number first_[f] + v.
class MetPairs {
 public:
  explicit MetPairs(const std::vector<int>& values) : values_(values) {
    for (int count : values) {
      first_.push_back(total_);
      total_ += size_t(count);
    }
    met_.resize(total_ * total_);
    for (size_t f = 0; f < values.size(); ++f) {
      for (size_t g = 0; g < f; ++g) missing_ += size_t(values[f]) * size_t(values[g]);
    }
  }
  size_t missing() const { return missing_; }
  bool met(size_t f, int v, size_t g, int w) const { return met_[index(f, v, g, w)]; }

  // The pair number `skip` of those that have not met, as factors and values.
  std::pair<std::pair<size_t, int>, std::pair<size_t, int>> missing_pair(size_t skip) const {
    for (size_t f = 0; f < values_.size(); ++f) {
      for (size_t g = 0; g < f; ++g) {
        for (int v = 0; v < values_[f]; ++v) {
          for (int w = 0; w < values_[g]; ++w) {
            if (!met(f, v, g, w) && skip-- == 0) return {{f, v}, {g, w}};
          }
        }
      }
    }
    return {};
  }

  void add(const std::vector<int>& row) {
    for (size_t f = 0; f < row.size(); ++f) {
      for (size_t g = 0; g < f; ++g) {
        if (met(f, row[f], g, row[g])) continue;
        met_[index(f, row[f], g, row[g])] = met_[index(g, row[g], f, row[f])] = true;
        --missing_;
      }
    }
  }

 private:
  size_t index(size_t f, int v, size_t g, int w) const {
    return (first_[f] + size_t(v)) * total_ + first_[g] + size_t(w);
  }

  std::vector<int> values_;
  std::vector<size_t> first_;
  std::vector<bool> met_;
  size_t total_ = 0, missing_ = 0;
};

struct Candidate {
  std::vector<int> row;
  size_t meets = 0;  // pairs that had not met before
};

inline Candidate draw_candidate(const std::vector<int>& values, const MetPairs& pairs, SplitMix64& random) {
  Candidate candidate{std::vector<int>(values.size()), 1};
  const auto [one, other] = pairs.missing_pair(random.below(pairs.missing()));
  candidate.row[one.first] = one.second;
  candidate.row[other.first] = other.second;
  std::vector<size_t> chosen{one.first, other.first}, open;
  for (size_t f = 0; f < values.size(); ++f) {
    if (f != one.first && f != other.first) open.push_back(f);
  }
  while (!open.empty()) {
    const size_t at = random.below(open.size()), f = open[at];
    open[at] = open.back();
    open.pop_back();
    // From a value drawn at random, so that none of several good ones is preferred.
    const int start = int(random.below(size_t(values[f])));
    int best = start;
    size_t most = 0;
    for (int step = 0; step < values[f]; ++step) {
      const int value = (start + step) % values[f];
      size_t meets = 0;
      for (size_t g : chosen) meets += !pairs.met(f, value, g, candidate.row[g]);
      if (meets > most) {
        most = meets;
        best = value;
      }
    }
    candidate.row[f] = best;
    candidate.meets += most;
    chosen.push_back(f);
  }
  return candidate;
}

// values: how many values each factor has, at least two factors and at least one value each. Returned values count
// from 0.
inline Rows pairwise_rows(const std::vector<int>& values, uint64_t seed) {
  constexpr int kCandidates = 50;
  SplitMix64 random(seed);
  MetPairs pairs(values);
  Rows rows;
  while (pairs.missing() > 0) {
    Candidate best;
    for (int i = 0; i < kCandidates; ++i) {
      Candidate candidate = draw_candidate(values, pairs, random);
      if (candidate.meets > best.meets) best = std::move(candidate);
    }
    pairs.add(best.row);
    rows.push_back(std::move(best.row));
  }
  return rows;
}

// Whether every row has a value of each factor, and every two values of every two factors meet in some row: found out
// without any of the above, for tests of it.
inline bool meets_all_pairs(const std::vector<int>& values, const Rows& rows) {
  for (const std::vector<int>& row : rows) {
    if (row.size() != values.size()) return false;
    for (size_t f = 0; f < row.size(); ++f) {
      if (row[f] < 0 || row[f] >= values[f]) return false;
    }
  }
  for (size_t f = 0; f < values.size(); ++f) {
    for (size_t g = 0; g < f; ++g) {
      for (int v = 0; v < values[f]; ++v) {
        for (int w = 0; w < values[g]; ++w) {
          bool met = false;
          for (const std::vector<int>& row : rows) met = met || (row[f] == v && row[g] == w);
          if (!met) return false;
        }
      }
    }
  }
  return true;
}

}  // namespace vitadapter::test
