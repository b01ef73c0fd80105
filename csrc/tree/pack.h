// Token lists as bytes, which tts_kernels/tree/pack.py sorts, compares and cuts.
#pragma once

#include <pybind11/pybind11.h>

namespace tts {

// The ids as int64 in a bytes object, or None where `ids` is no list, an entry no int, or one outside of [0, 2^31): the
// caller then names the culprit.
pybind11::object token_bytes(pybind11::object ids);

}  // namespace tts
