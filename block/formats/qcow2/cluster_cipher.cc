#include "block/formats/qcow2/cluster_cipher.h"

#include <algorithm>

#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

using crypto::kSectorBytes;

/// Calls fn(index of the first sector, bytes) for runs of whole sectors; those that lie across pieces of the list are
/// put together first.
template <class Fn>
void for_sectors(const IoVec& iov, Fn fn) {
    CHECK(iov.bytes % kSectorBytes == 0, "whole sectors are encrypted");
    size_t done = 0;
    size_t used = 0;  // of piece i
    for (uint32_t i = 0; done < iov.bytes;) {
        const iovec& piece = iov.data[i];
        if (used >= piece.iov_len) {
            used -= piece.iov_len;
            i++;
            continue;
        }
        const size_t direct = (piece.iov_len - used) / kSectorBytes * kSectorBytes;
        if (direct) {
            fn(done / kSectorBytes, std::span(static_cast<uint8_t*>(piece.iov_base) + used, direct));
            done += direct;
            used += direct;
            continue;
        }
        uint8_t sector[kSectorBytes];
        copy_from_iovec(iov, done, sector, kSectorBytes);
        fn(done / kSectorBytes, std::span(sector));
        copy_to_iovec(iov, done, sector, kSectorBytes);
        done += kSectorBytes;
        used += kSectorBytes;
    }
}

void encrypt_list(const crypto::SectorCipher& cipher, uint64_t offset, const IoVec& iov) {
    const uint64_t first = offset / kSectorBytes;
    for_sectors(iov, [&](uint64_t index, std::span<uint8_t> data) { cipher.encrypt(first + index, data); });
}
void decrypt_list(const crypto::SectorCipher& cipher, uint64_t offset, const IoVec& iov) {
    const uint64_t first = offset / kSectorBytes;
    for_sectors(iov, [&](uint64_t index, std::span<uint8_t> data) { cipher.decrypt(first + index, data); });
}

class LuksClusters final : public ClusterCipher {
  public:
    explicit LuksClusters(crypto::LuksVolume volume) : volume_(std::move(volume)) {}
    Result<> encrypt(uint64_t, uint64_t host, const IoVec& iov) override {
        encrypt_list(*volume_.cipher, host, iov);
        return {};
    }
    Result<> decrypt(uint64_t, uint64_t host, const IoVec& iov) override {
        decrypt_list(*volume_.cipher, host, iov);
        return {};
    }
    json::object info() const override {
        json::object out{{"format", "luks"}};
        for (const auto& member : crypto::luks_info(volume_.header)) out[member.key()] = member.value();
        return out;
    }
    crypto::LuksVolume* luks() override { return &volume_; }

  private:
    crypto::LuksVolume volume_;
};

class LegacyClusters final : public ClusterCipher {
  public:
    explicit LegacyClusters(std::unique_ptr<crypto::SectorCipher> cipher) : cipher_(std::move(cipher)) {}
    Result<> encrypt(uint64_t guest, uint64_t, const IoVec& iov) override {
        encrypt_list(*cipher_, guest, iov);
        return {};
    }
    Result<> decrypt(uint64_t guest, uint64_t, const IoVec& iov) override {
        decrypt_list(*cipher_, guest, iov);
        return {};
    }
    json::object info() const override { return {{"format", "aes"}}; }

  private:
    std::unique_ptr<crypto::SectorCipher> cipher_;
};

class LockedClusters final : public ClusterCipher {
  public:
    LockedClusters(std::string node, json::object info) : node_(std::move(node)), info_(std::move(info)) {}
    Result<> encrypt(uint64_t, uint64_t, const IoVec&) override { return refused(); }
    Result<> decrypt(uint64_t, uint64_t, const IoVec&) override { return refused(); }
    json::object info() const override { return info_; }

  private:
    std::unexpected<Error> refused() const {
        return fail(ErrorKind::kPermission, "node '{}': the image is encrypted and was opened without its passphrase",
                    node_);
    }
    std::string node_;
    json::object info_;
};

}  // namespace

std::unique_ptr<ClusterCipher> luks_cipher(crypto::LuksVolume volume) {
    return std::make_unique<LuksClusters>(std::move(volume));
}

Result<std::unique_ptr<ClusterCipher>> legacy_cipher(const crypto::SecretBytes& passphrase) {
    using namespace crypto;
    const CipherSpec spec{CipherAlg::kAes128, CipherMode::kCbc, IvGenerator::kPlain64, {}};
    SecretBytes key(spec.key_bytes());  // shorter passphrases are padded with zeroes, longer ones cut
    std::copy_n(passphrase.data(), std::min(passphrase.size(), key.size()), key.data());
    TRY(auto cipher, SectorCipher::create(spec, key.span()));
    return std::make_unique<LegacyClusters>(std::move(cipher));
}

std::unique_ptr<ClusterCipher> locked_cipher(std::string node, json::object info) {
    return std::make_unique<LockedClusters>(std::move(node), std::move(info));
}

}  // namespace gantry::block::qcow2
