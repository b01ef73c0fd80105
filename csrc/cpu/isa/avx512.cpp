// AVX-512 F/BW/DQ/VL. bf16 is widened to fp32: the dpbf16 instruction is slower than the fp32 FMA where it was
// measured.
#define TTS_VECTOR_WIDTH 16
#include "../fma_path.h"
#include "../fma_code_path.h"

namespace tts {
extern const CodePath kAvx512 = fma_code_path("avx512");
}
