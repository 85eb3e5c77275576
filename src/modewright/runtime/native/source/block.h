// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernel.h"

#define MW_EXPORT __attribute__((visibility("default")))

namespace mw {

enum BlockWeight { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kBlockWeights };

// Attention with rotary embeddings and a gated activation, each behind a norm and beside a shortcut:
// Llama's block. Mirrored by modewright.runtime.native.block.BlockStruct.
struct Block {
  const Weight* weights[kBlockWeights];
  const void* biases[kBlockWeights];   // or null
  float act_scales[kBlockWeights];     // of inputs that have a given one
  int32_t acts[kBlockWeights];         // Activation
  const void* norms[2];                // of attention, and of what follows
  float eps[2];
  int64_t width, heads, kv_heads, features, inner;
  float scaling;  // of scores
  int32_t dtype;  // Dtype of biases, norms, and what goes in and out
};

}  // namespace mw

extern "C" {
int mw_linear(const mw::Weight*, const void* x, int64_t rows, const void* bias, void* y, float scale,
              int options);
void mw_rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t n, float eps,
                 int options);
void mw_silu_gate(void* gate, const void* up, int64_t count, int options);
void mw_rotate(float* query, float* key, const float* cos, const float* sin, int64_t texts,
               int64_t heads, int64_t kv_heads, int64_t features, int64_t stride, int place);
int mw_attend_next(mw::Attention*, int place, int threads);
}
