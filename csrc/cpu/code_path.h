// The table through which the scheduler reaches the bodies of a code path.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "code_path_table.h"

namespace tts {

// TTS_KERNELS_CPU_ISA (read at every call), else the best path of this machine. Throws std::invalid_argument.
const CodePath& active_code_path();
std::string active_code_path_name();
// Every path's name, and why it cannot run here ("" where it can).
std::vector<std::pair<std::string, std::string>> code_paths();

}  // namespace tts
