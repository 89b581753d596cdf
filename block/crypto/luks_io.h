// What opening, creating and amending LUKS volumes share. Internal to block/crypto/.

#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "block/crypto/luks.h"

namespace gantry::block::crypto {

/// [at, at + bytes) of the area. `what` for the error (a literal). kCorrupt when it leaves the area; what the file does
/// not have reads as zeroes.
Task<Result<>> read_area(LuksArea area, uint64_t at, std::span<uint8_t> to, std::string_view what);
Task<Result<>> write_area(LuksArea area, uint64_t at, std::span<const uint8_t> from, std::string_view what);
Task<Result<>> zero_area(LuksArea area);
Task<Result<>> flush_area(LuksArea area);

/// Iterations that take so long here, within what is used at all: kTooLarge beyond it. Computes.
Result<uint32_t> iterations_for(HashAlg hash, size_t bytes, uint64_t milliseconds);
/// Salt and iterations of a slot for `passphrase`, and its encrypted key material. Computes.
Result<SecretBytes> seal_slot(const LuksHeader& header, LuksSlot& slot, std::span<const uint8_t> master_key,
                              std::span<const uint8_t> passphrase, uint64_t iter_time_ms);
/// The master key if `passphrase` opens the slot.
Task<Result<std::optional<SecretBytes>>> unlock_slot(LuksArea area, const LuksHeader& header, uint32_t number,
                                                     std::span<const uint8_t> passphrase);

}  // namespace gantry::block::crypto
