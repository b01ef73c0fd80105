// The CPU scoring ops: each runs on the calling thread and `threads - 1` more of the OpenMP pool.
#pragma once

#include "../params.h"

namespace tts {

void run_score_logits(const ScoreLogitsParams& p, int threads);
void run_token_logprobs(const TokenLogprobsParams& p, int threads);
void run_reduce_scores(const ReduceScoresParams& p, int threads);
void run_select(const SelectParams& p);  // on the calling thread alone

}  // namespace tts
