// Any bytes as a LUKS header: what is decoded is sane, and encoding it decodes to the same.

#include <cstdint>
#include <span>
#include <vector>

#include "block/crypto/cipher.h"
#include "block/crypto/luks_header.h"
#include "runtime/check.h"

using namespace gantry::block::crypto;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const auto header = decode_luks_header({data, size});
    if (!header) return 0;
    CHECK(header->material_bytes() <= 64 * kLuksStripes, "key material is bounded");
    for (const LuksSlot& slot : header->slots) {
        CHECK(!slot.active || (slot.iterations > 0 && slot.iterations <= kLuksMaxIterations), "work is bounded");
    }
    CHECK(SectorCipher::create(header->cipher, std::vector<uint8_t>(header->key_bytes)), "the cipher exists");
    const auto bytes = encode_luks_header(*header);
    const auto again = decode_luks_header(bytes);
    CHECK(again && encode_luks_header(*again) == bytes, "encoding and decoding agree");
    return 0;
}
