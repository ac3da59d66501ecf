// Could one of the barriers and waits in the fast CUDA kernels be missing? Each is left out once, in a
// process of its own, and the trials there must not end well.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "cuda_arc_cases.h"
#include "cuda_consolidator_cases.h"

namespace vitadapter::test {
namespace {

using cuda::emulator::Site;

// A trial that is ready to run again and again, with one of the sites ignored.
using Run = std::function<void(const Site& ignored)>;

template <typename AnyTrial, typename AnyCase>
Run prepared(const AnyTrial& trial, int number, std::shared_ptr<const AnyCase> problem, const Exact& expected) {
  return [=](const Site& ignored) {
    AnyTrial faulty = trial;
    faulty.settings.ignored_site = ignored;
    check_trial(number, faulty, *problem, expected, kOrders);
  };
}

// Cases with several tiles a block, several chunks and several blocks of ranks.
template <typename Make>
std::vector<Run> prepared_trials(const Make& make_problem) {
  std::vector<Run> all;
  for (int keep : {0, 1}) {
    for (int64_t rank : {8, 40, 150}) {
      for (const Numbers& numbers : {kNumbers[0], kNumbers[2], kNumbers[4], kNumbers[5]}) {
        Trial trial;
        trial.options = full_options(200, 200, rank, numbers);
        trial.options.scale_is_channel = keep;
        trial.options.drop_path = 0.5;
        if (keep) trial.options.dropout_out = 0.3;
        trial.settings.multiprocessors = 1;
        trial.request.keep = keep;
        const int number = int(all.size());
        begin_case(1, number);
        const auto problem = make_problem(trial.options);
        all.push_back(prepared(trial, number, problem, exact_of(*problem)));
      }
    }
  }
  return all;
}

// Cases with several tiles a block and branches whose groups differ.
std::vector<Run> prepared_consolidator_trials() {
  std::vector<Run> all;
  for (int needs : {int(kInputGrad), int(kWeightGrads), int(kBiasGrads), int(kAllConsolidatorGrads)}) {
    ConsolidatorTrial trial;
    trial.options = full_consolidator_options(70, 16, 48, {8, 2}, kConsolidatorNumbers[0]);
    trial.options.drop_path = 0.5;
    trial.settings.multiprocessors = 1;
    trial.needs = needs;
    const int number = int(all.size());
    begin_case(1, number);
    const std::shared_ptr<const ConsolidatorCase> problem = make_consolidator_case(trial.options);
    all.push_back(prepared(trial, number, problem, exact(*problem)));
  }
  return all;
}

// Whether a child that runs `work` ends well; what it says is not shown.
template <typename Work>
bool ends_well(const Work& work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stdout) || !std::freopen("/dev/null", "w", stderr)) _exit(3);
    failures = 0;
    work();
    _exit(failures ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Leaves out each site that the trials come by and that is not among `known`; returns all of them.
std::map<Site, int64_t> leave_out(const char* kernels, const std::vector<Run>& all,
                                  const std::map<Site, int64_t>& known) {
  const auto run_all = [&](const Site& ignored) {
    const int failures_before = failures;
    // Until one fails.
    for (size_t i = 0; i < all.size() && failures == failures_before; ++i) all[i](ignored);
  };
  statistics = {};
  run_all({});
  const auto sites = statistics.sites;
  expect(ends_well([&] { run_all({}); }), "without a fault, a child does not end well");
  int left_out = 0, unnoticed = 0;
  for (const auto& [site, count] : sites) {
    if (known.contains(site)) continue;
    ++left_out;
    if (!ends_well([&, site = site] { run_all(site); })) continue;
    std::printf("%s: nothing noticed that %s:%d was left out\n", kernels, site.file, site.line);
    ++unnoticed;
  }
  failures += unnoticed;
  std::printf("%s: each of %d barriers and waits left out, %d times unnoticed\n", kernels, left_out, unnoticed);
  return sites;
}

}  // namespace

int check_faults() {
  const int before = failures;
  const auto adapter = [](const CaseOptions& o) { return std::shared_ptr<const Case>(make_case(o)); };
  const auto arc = [](const CaseOptions& o) { return std::shared_ptr<const ArcCase>(make_arc_case(o, 1)); };
  const auto known = leave_out("fast adapter kernels", prepared_trials(adapter), {});
  leave_out("what only ARC's kernels have", prepared_trials(arc), known);
  leave_out("fast consolidator kernels", prepared_consolidator_trials(), {});
  return failures - before;
}

}  // namespace vitadapter::test
