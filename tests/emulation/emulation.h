// A SIMT machine on the host: the threads of a block are fibers, several blocks are alive at a time, and which thread goes
// on is drawn from a seed wherever one waits. What a kernel must not lean on is made to show:
//   warp functions   happen when all 32 lanes are there; a lane that ended or stands elsewhere is an error
//   barriers         likewise for the block; where nobody can go on, the error says who waits where
//   shared memory    is NaN in every format until it is written, and ends in red zones
//   cp.async         the target is NaN from the copy's issue until the bytes land: at the wait, or earlier by chance
//   store_state, ..  the target is NaN for everyone but the block, until chance has it, or until a thread has fenced it and
//                    then changed something by an atomic or such a store
//   sm_90a           barriers in shared memory with phases, arrivals and bytes; a box comes at some time before the
//                    barrier says so, until then its target is NaN; wgmma happens at some time before its wait, reads
//                    shared memory as it is then, by the real descriptors, and until the wait its a must not change and
//                    its d is NaN. What cp.async brought is NaN for wgmma until the thread has fenced it for the async
//                    proxy
// Not modelled: plain stores to shared memory that the async proxy does not see yet, caches (a plain load of what
// another block wrote is always fresh), the fence of a reader, races of plain accesses between two points where a thread
// may lose its turn. Time is not modelled at all.
//
// TTS_EMULATION_SEED or `seed()`: 0 is plain order, everything late; else launch n of a seed is the same each time.
#pragma once

#include "async.h"
#include "machine.h"
#include "meetings.h"
#include "memory.h"
#include "scheduler.h"
