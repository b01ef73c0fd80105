// AVX-512 + AMX-bf16: matrix tiles for bf16 queries over bf16 or fp8 KV, the FMA path for the rest.
#define TTS_VECTOR_WIDTH 16
#include "../amx_tile.h"
#include "../amx_path.h"

namespace tts {
extern const CodePath kAmx = amx_code_path("amx");
}
