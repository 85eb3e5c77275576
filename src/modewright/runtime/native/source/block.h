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
  const float* biases[kBlockWeights];  // or null
  float act_scales[kBlockWeights];     // of inputs that have a given one
  int32_t acts[kBlockWeights];         // Activation
  const float* norms[2];               // of attention, and of what follows
  float eps[2];
  int64_t width, heads, kv_heads, features, inner;
};

}  // namespace mw

extern "C" {
int mw_linear(const mw::Weight*, const void* x, int64_t rows, const void* bias, void* y, float scale,
              int options);
void mw_rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t n, float eps,
                 int place, int threads);
void mw_silu_gate(float* gate, const float* up, int64_t count, int place, int threads);
void mw_rotate(float* query, float* key, const float* cos, const float* sin, int64_t texts,
               int64_t heads, int64_t kv_heads, int64_t features, int64_t stride, int place);
int mw_attend_next(mw::Attention*, int place, int threads);
}
