// Any CPU: 16-byte vectors, which every compiler target either has or lowers.
#define TTS_VECTOR_WIDTH 4
#include "../fma_path.h"
#include "../fma_code_path.h"

namespace tts {
extern const CodePath kPortable = fma_code_path("portable");
}
