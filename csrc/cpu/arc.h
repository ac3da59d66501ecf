// The CPU side of the arc op; the mathematics is in ../common/arc.h.
#pragma once

#include "../common/arc.h"
#include "level.h"
#include "parallel.h"

namespace vitadapter::cpu {

// Runs a problem at a level that this machine has.
void arc_forward(Level level, const ArcForward& problem, ParallelFor parallel_for);
void arc_backward(Level level, const ArcBackward& problem, ParallelFor parallel_for);

}  // namespace vitadapter::cpu
