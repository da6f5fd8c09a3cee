// How products of a decoding step's rows with weights are cut, as the host sees it too.
#pragma once

namespace mamba2::norm_linear {

constexpr int kRows = 64;  // of a block
constexpr int kSms = 132;  // of an H100 or H200, whatever the card: results must not depend on it

}  // namespace mamba2::norm_linear
