// Guest data of encrypted images, on its way from the file and to it.

#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/blocking_pool.h"

namespace gantry::block::qcow2 {

namespace {

/// Up to here computing costs less than a thread's wake-up.
constexpr size_t kInlineBytes = 16 << 10;

Task<Result<>> decrypt_on_pool(ClusterCipher* cipher, uint64_t guest, uint64_t host, IoVec iov) {
    co_return co_await run_blocking([&] { return cipher->decrypt(guest, host, iov); });
}
Task<Result<>> encrypt_on_pool(ClusterCipher* cipher, uint64_t guest, uint64_t host, IoVec iov) {
    co_return co_await run_blocking([&] { return cipher->encrypt(guest, host, iov); });
}

}  // namespace

Task<Result<>> Qcow2Node::decode_in_place(Request&, uint64_t guest_offset, uint64_t host_offset, IoVec iov) {
    if (iov.bytes <= kInlineBytes) return ready_task(cipher_->decrypt(guest_offset, host_offset, iov));
    return decrypt_on_pool(cipher_.get(), guest_offset, host_offset, iov);
}

Task<Result<>> Qcow2Node::encode_in_place(Request&, uint64_t guest_offset, uint64_t host_offset, IoVec iov) {
    if (iov.bytes <= kInlineBytes) return ready_task(cipher_->encrypt(guest_offset, host_offset, iov));
    return encrypt_on_pool(cipher_.get(), guest_offset, host_offset, iov);
}

}  // namespace gantry::block::qcow2
