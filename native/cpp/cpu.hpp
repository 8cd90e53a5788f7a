// Which instruction set the engine uses on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace medusa {

// The sets that this build holds and this machine runs, best first; "portable" is always last.
std::vector<std::string> usable_isas();

// The kernels called `isa`, or the best ones where it is empty. Throws std::invalid_argument for a name that is not
// usable here.
const Kernels& kernels_for(const std::string& isa);

// Bytes per second that `threads` threads read from memory together: the best of several passes over 256 MiB.
double read_bandwidth(int threads);

}  // namespace medusa
