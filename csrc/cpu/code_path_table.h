// The bodies of one code path. No standard header here: the files of isa/ must not emit shared inline functions.
#pragma once

#include "scoring_table.h"
#include "work.h"

namespace tts {

struct CodePath {
  const char* name;
  int64_t (*scratch_bytes)(const TreeAttentionParams&);  // per thread, 64-byte aligned
  void (*enter)();                                       // once per thread before its first item
  void (*leave)();
  // `next` is what this thread runs afterwards, or null: its first tokens are asked for while this item computes.
  void (*run_item)(const TreeAttentionParams&, const States&, const WorkItem&, const WorkItem* next, void* scratch);
  void (*finish_row)(const TreeAttentionParams&, const States&, int row, void* scratch);
  void (*merge_states)(const MergeStatesParams&, int64_t begin, int64_t end);
  ScoringPath scoring;
};

}  // namespace tts
