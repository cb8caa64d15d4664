// Counter-based random numbers, for host and device: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"). The same seed and counter give the same words everywhere.
#pragma once
#include "numbers.h"

namespace vlmfast {
namespace {

constexpr uint32_t philox_multiplier_0 = 0xD2511F53u, philox_multiplier_1 = 0xCD9E8D57u;
constexpr uint32_t philox_step_0 = 0x9E3779B9u, philox_step_1 = 0xBB67AE85u;
constexpr int philox_rounds = 10;

// Four counter words become four random words.
VLMFAST_HD void philox(uint64_t seed, uint32_t word[4]) {
  uint32_t key_0 = uint32_t(seed), key_1 = uint32_t(seed >> 32);
  for (int round = 0; round < philox_rounds; ++round) {
    uint64_t first = uint64_t(philox_multiplier_0) * word[0], second = uint64_t(philox_multiplier_1) * word[2];
    word[0] = uint32_t(second >> 32) ^ word[1] ^ key_0;
    word[1] = uint32_t(second);
    word[2] = uint32_t(first >> 32) ^ word[3] ^ key_1;
    word[3] = uint32_t(first);
    key_0 += philox_step_0;
    key_1 += philox_step_1;
  }
}

// Words at least this large are kept: the rate to 32 bits; 2^32, which no word reaches, for a rate of 1.
VLMFAST_HD uint64_t dropout_threshold(double rate) { return uint64_t(rate * 4294967296.0); }

}  // namespace
}  // namespace vlmfast
