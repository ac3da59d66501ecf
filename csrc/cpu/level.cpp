#include "level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace vitadapter::cpu {
namespace {

bool has(Level level) {
#if VITADAPTER_X86
  switch (level) {
    case Level::kPortable: return true;
    case Level::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Level::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    default: return __builtin_cpu_supports("avx512bf16");
  }
#else
  return level == Level::kPortable;
#endif
}

Level find(const std::string& wanted, const std::string& source) {
  std::string known;
  for (Level level : supported_levels()) {
    if (wanted == name(level)) return level;
    known += (known.empty() ? "" : ", ") + std::string(name(level));
  }
  throw std::runtime_error(source + " is '" + wanted + "', but this machine has: " + known);
}

Level initial_level() {
  const char* forced = std::getenv("VITADAPTER_CPU");
  return forced && *forced ? find(forced, "VITADAPTER_CPU") : supported_levels().back();
}

std::atomic<Level>& current() {
  static std::atomic<Level> level = initial_level();
  return level;
}

}  // namespace

const char* name(Level level) {
  switch (level) {
    case Level::kPortable: return "portable";
    case Level::kAvx2: return "avx2";
    case Level::kAvx512: return "avx512";
    default: return "bf16";
  }
}

std::vector<Level> supported_levels() {
  std::vector<Level> levels;
  for (Level level : {Level::kPortable, Level::kAvx2, Level::kAvx512, Level::kBf16}) {
    if (!has(level)) break;
    levels.push_back(level);
  }
  return levels;
}

Level level() { return current().load(std::memory_order_relaxed); }

void use_level(const std::string& wanted) { current() = find(wanted, "the CPU level"); }

}  // namespace vitadapter::cpu
