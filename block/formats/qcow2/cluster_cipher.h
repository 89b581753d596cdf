// ClusterCipher: the encryption of guest data in an image (spec/qcow2.md section 10).

#pragma once

#include <cstdint>
#include <memory>

#include "runtime/error.h"
#include "runtime/iovec.h"

namespace gantry::block::qcow2 {

/// In place, whole sectors of 512 bytes. Computation only; any thread, several at once.
class ClusterCipher {
  public:
    virtual ~ClusterCipher() = default;
    /// `guest` and `host`: offsets of the first byte; the method decides which of them numbers the sectors.
    virtual Result<> encrypt(uint64_t guest, uint64_t host, const IoVec& iov) = 0;
    virtual Result<> decrypt(uint64_t guest, uint64_t host, const IoVec& iov) = 0;
};

}  // namespace gantry::block::qcow2
