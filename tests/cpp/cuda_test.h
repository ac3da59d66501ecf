// The parts of cuda_test, a file each.
#pragma once

#include <string>

namespace vitadapter::test {

// Every function prints what it ran and what failed, and returns the number of failures.

// emulator_test.cpp
int check_emulator();

// cuda_adapter_limits_test.cpp
int check_adapter_limits();

// cuda_faults_test.cpp
int check_faults();

// cuda_adapter_test.cpp
int check_adapter_samples(int seed, int most);
int check_adapter_everywhere(int part, int parts);
// {"kernel": {"sm_80": {"threads": ..., "shared": ...}, ...}, ...}: how the fast kernels are launched on three
// architectures.
std::string launches();

// cuda_arc_test.cpp
int check_arc_samples(int seed, int most);
int check_arc_limits();

// cuda_consolidator_test.cpp
int check_consolidator_samples(int seed, int most);
int check_consolidator_limits();

}  // namespace vitadapter::test
