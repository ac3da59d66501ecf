// Which instruction-set level do the CPU kernels use? VITADAPTER_CPU forces one of those that this build has.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitadapter::cpu {

// Throws where VITADAPTER_CPU names a level that this build or machine has not.
inline std::string level() {
  const char* forced = std::getenv("VITADAPTER_CPU");
  if (forced && *forced && std::string(forced) != "portable") {
    throw std::runtime_error("VITADAPTER_CPU is '" + std::string(forced) + "', but this build has: portable");
  }
  return "portable";
}

}  // namespace vitadapter::cpu
