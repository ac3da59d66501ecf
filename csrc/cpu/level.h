// Which instruction-set level do the CPU kernels use? The highest that the machine has; VITADAPTER_CPU forces one.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VITADAPTER_X86 1
#else
#define VITADAPTER_X86 0
#endif

namespace vitadapter::cpu {

enum class Level : int { kPortable, kAvx2, kAvx512, kBf16 };

const char* name(Level level);

// What this machine has, lowest first; each level includes those below it.
std::vector<Level> supported_levels();

// The level in use. The first call reads VITADAPTER_CPU; throws std::runtime_error where that names a level that this
// machine has not.
Level level();

// From now on this one (for tests and comparisons); throws std::runtime_error as above.
void use_level(const std::string& name);

}  // namespace vitadapter::cpu
