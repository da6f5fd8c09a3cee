// Launchers of the sm_90a forward (fused_scan_sm90.cuh).
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

// One pass over all tasks.
int fused_scan(const FusedScanArgs& args, DType dtype, bool gate, int sm_count, void* stream);
// The same for what is not plain (fused_scan_sm90.cuh); fused_scan calls it.
int fused_scan_general(const FusedScanArgs& args, DType dtype, bool gate, int sm_count,
                       void* stream);

// Sets tickets and flags to 0 before a fused_scan that has some.
int clear_words(int* words, int count, void* stream);

// From what each segment adds to what enters it, in place: carry (segments, units, 64 n).
int segment_scan(float* carry, const float* through_log2, int segments, int units, int n,
                 void* stream);

// final_states of packed sequences that have no token: their initial states, or zero.
int finish_empty_sequences(const ForwardParams& params, const Chunking& chunking, void* stream);

}  // namespace mamba2::ssd::sm90
