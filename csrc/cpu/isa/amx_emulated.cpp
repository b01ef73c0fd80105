// The AMX path with its tile instructions emulated in plain C++: slow, runs anywhere, for tests.
#define TTS_VECTOR_WIDTH 16
#include "../amx_tile_emulated.h"
#include "../amx_path.h"

namespace tts {
extern const CodePath kAmxEmulated = amx_code_path("amx-emulated");
}
