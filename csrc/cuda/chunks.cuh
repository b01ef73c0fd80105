// The rule of chunks, as in tts_kernels/attention/work.py: by a node's length and own rows, never by those below it.
#pragma once

#include "device.cuh"

namespace tts {

TTS_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The most chunks of a node: where its own rows fill many tiles, they fill the GPU without chunks.
TTS_DEVICE int most_chunks(int own_rows, int group, int wide_rows, int max_chunks) {
  return max(max_chunks / max(ceil_div(own_rows * group, wide_rows), 1), 1);
}

TTS_DEVICE int chunk_tokens(int length, int most, int min_chunk) {
  return max(ceil_div(ceil_div(length, most), min_chunk), 1) * min_chunk;
}

}  // namespace tts
