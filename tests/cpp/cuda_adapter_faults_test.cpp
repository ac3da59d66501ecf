// Could one of the barriers and waits in the adapter's fast CUDA kernels be missing? Each is left out once, in a
// process of its own, and the trials there must not end well.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_adapter_cases.h"

namespace vitadapter::test {
namespace {

using cuda::emulator::Site;

struct Prepared {
  Trial trial;
  std::unique_ptr<Case> problem;
  Exact expected;
};

// Cases with several tiles a block, several chunks and several blocks of ranks.
std::vector<Prepared> prepared_trials() {
  std::vector<Prepared> all;
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
        begin_case(1, int(all.size()));
        auto problem = make_case(trial.options);
        Exact expected = exact_of(*problem);
        all.push_back({trial, std::move(problem), std::move(expected)});
      }
    }
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

}  // namespace

int check_adapter_faults() {
  const int before = failures;
  const std::vector<Prepared> all = prepared_trials();
  const auto run_all = [&](const Site& ignored) {
    const int failures_before = failures;
    // Until one fails.
    for (int number = 0; number < int(all.size()) && failures == failures_before; ++number) {
      const auto& [trial, problem, expected] = all[size_t(number)];
      Trial faulty = trial;
      faulty.settings.ignored_site = ignored;
      check_trial(number, faulty, *problem, expected, kOrders);
    }
  };
  statistics = {};
  run_all({});
  const auto sites = statistics.sites;
  expect(ends_well([&] { run_all({}); }), "without a fault, a child does not end well");
  int unnoticed = 0;
  for (const auto& [site, count] : sites) {
    if (!ends_well([&, site = site] { run_all(site); })) continue;
    std::printf("fast adapter kernels: nothing noticed that %s:%d was left out\n", site.file, site.line);
    ++unnoticed;
  }
  failures += unnoticed;
  std::printf("fast adapter kernels: each of %zu barriers and waits left out, %d times unnoticed\n", sites.size(),
              unnoticed);
  return failures - before;
}

}  // namespace vitadapter::test
