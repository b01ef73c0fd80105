// AVX2 + FMA + F16C.
#define TTS_VECTOR_WIDTH 8
#include "../fma_path.h"
#include "../fma_code_path.h"

namespace tts {
extern const CodePath kAvx2 = fma_code_path("avx2");
}
