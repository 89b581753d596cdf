// What the kernel and a FUSE server say to each other on /dev/fuse: numbers and layouts (FUSE protocol 7.45). Native
// endian; every struct fills 8-byte units. Carried here because distributions' headers stop at older versions.

#pragma once

#include <cstdint>

namespace gantry::fuse {

constexpr uint32_t kMajor = 7;
constexpr uint32_t kMinor = 45;        // the newest we know
constexpr uint32_t kOldestMinor = 31;  // older kernels are refused
constexpr uint64_t kRootNode = 1;

enum class Opcode : uint32_t {
    kLookup = 1,
    kForget = 2,  // never answered
    kGetattr = 3,
    kSetattr = 4,
    kOpen = 14,
    kRead = 15,
    kWrite = 16,
    kStatfs = 17,
    kRelease = 18,
    kFsync = 20,
    kSetxattr = 21,
    kGetxattr = 22,
    kListxattr = 23,
    kRemovexattr = 24,
    kFlush = 25,
    kInit = 26,
    kInterrupt = 36,  // need not be answered
    kDestroy = 38,
    kIoctl = 39,
    kNotifyReply = 41,
    kBatchForget = 42,  // never answered
    kFallocate = 43,
    kLseek = 46,
    kCopyFileRange = 47,
    kSyncfs = 50,
    kStatx = 52,
};

struct InHeader {
    uint32_t len = 0;
    uint32_t opcode = 0;
    uint64_t unique = 0;  // all bits go back with the reply; kResent: it was sent before
    uint64_t nodeid = 0;
    uint32_t uid = 0, gid = 0, pid = 0;
    uint16_t total_extlen = 0;  // in units of 8 bytes
    uint16_t padding = 0;
};
static_assert(sizeof(InHeader) == 40);
constexpr uint64_t kResent = uint64_t{1} << 63;

struct OutHeader {
    uint32_t len = 0;
    int32_t error = 0;  // 0 or -errno; of a notification its code
    uint64_t unique = 0;
};
static_assert(sizeof(OutHeader) == 16);

struct InitIn {
    uint32_t major = 0, minor = 0, max_readahead = 0, flags = 0, flags2 = 0;
    uint32_t unused[11] = {};
};
static_assert(sizeof(InitIn) == 64);
struct InitOut {
    uint32_t major = 0, minor = 0, max_readahead = 0, flags = 0;
    uint16_t max_background = 0, congestion_threshold = 0;
    uint32_t max_write = 0, time_gran = 0;
    uint16_t max_pages = 0, map_alignment = 0;
    uint32_t flags2 = 0, max_stack_depth = 0;
    uint16_t request_timeout = 0, unused[11] = {};
};
static_assert(sizeof(InitOut) == 64);
constexpr uint32_t kCompatInitOut = 24;  // what a kernel of another major version reads

/// INIT flags, 64 bits: the upper half travels in flags2 and counts only with kInitExt.
constexpr uint64_t init_bit(unsigned n) { return uint64_t{1} << n; }
constexpr uint64_t kAsyncRead = init_bit(0);
constexpr uint64_t kAtomicOTrunc = init_bit(3);
constexpr uint64_t kBigWrites = init_bit(5);
constexpr uint64_t kAutoInvalData = init_bit(12);
constexpr uint64_t kAsyncDio = init_bit(15);
constexpr uint64_t kAbortError = init_bit(21);
constexpr uint64_t kMaxPages = init_bit(22);
constexpr uint64_t kExplicitInvalData = init_bit(25);
constexpr uint64_t kInitExt = init_bit(30);
constexpr uint64_t kDirectIoAllowMmap = init_bit(36);
constexpr uint64_t kPassthrough = init_bit(37);
constexpr uint64_t kNoExportSupport = init_bit(38);
constexpr uint64_t kHasResend = init_bit(39);
constexpr uint64_t kOverIoUring = init_bit(41);

struct Attr {
    uint64_t ino = 0, size = 0, blocks = 0, atime = 0, mtime = 0, ctime = 0;
    uint32_t atime_nsec = 0, mtime_nsec = 0, ctime_nsec = 0;
    uint32_t mode = 0, nlink = 0, uid = 0, gid = 0, rdev = 0, blksize = 0, flags = 0;
};
static_assert(sizeof(Attr) == 88);
struct AttrOut {
    uint64_t attr_valid = 0;  // seconds
    uint32_t attr_valid_nsec = 0, padding = 0;
    Attr attr;
};
static_assert(sizeof(AttrOut) == 104);
struct GetattrIn {
    uint32_t flags = 0, padding = 0;
    uint64_t fh = 0;
};
static_assert(sizeof(GetattrIn) == 16);
struct SetattrIn {
    uint32_t valid = 0, padding = 0;
    uint64_t fh = 0, size = 0, lock_owner = 0, atime = 0, mtime = 0, ctime = 0;
    uint32_t atime_nsec = 0, mtime_nsec = 0, ctime_nsec = 0, mode = 0, unused4 = 0, uid = 0, gid = 0, unused5 = 0;
};
static_assert(sizeof(SetattrIn) == 88);
constexpr uint32_t kSetMode = 1, kSetUid = 2, kSetGid = 4, kSetSize = 8, kSetAtime = 0x10, kSetMtime = 0x20;
constexpr uint32_t kSetFh = 0x40, kSetAtimeNow = 0x80, kSetMtimeNow = 0x100, kSetLockOwner = 0x200, kSetCtime = 0x400;
constexpr uint32_t kSetKillSuidgid = 0x800;

struct OpenIn {
    uint32_t flags = 0, open_flags = 0;
};
static_assert(sizeof(OpenIn) == 8);
struct OpenOut {
    uint64_t fh = 0;
    uint32_t open_flags = 0;
    int32_t backing_id = 0;
};
static_assert(sizeof(OpenOut) == 16);
constexpr uint32_t kOpenDirectIo = 1, kOpenKeepCache = 2, kOpenNoFlush = 0x20, kOpenParallelDirectWrites = 0x40;
constexpr uint32_t kOpenPassthrough = 0x80;

struct ReadIn {
    uint64_t fh = 0, offset = 0;
    uint32_t size = 0, read_flags = 0;
    uint64_t lock_owner = 0;
    uint32_t flags = 0, padding = 0;
};
static_assert(sizeof(ReadIn) == 40);
struct WriteIn {
    uint64_t fh = 0, offset = 0;
    uint32_t size = 0, write_flags = 0;
    uint64_t lock_owner = 0;
    uint32_t flags = 0, padding = 0;  // flags: those of open(2); the data follows
};
static_assert(sizeof(WriteIn) == 40);
struct WriteOut {
    uint32_t size = 0, padding = 0;
};
static_assert(sizeof(WriteOut) == 8);
struct FsyncIn {
    uint64_t fh = 0;
    uint32_t fsync_flags = 0, padding = 0;
};
static_assert(sizeof(FsyncIn) == 16);
struct FlushIn {
    uint64_t fh = 0;
    uint32_t unused = 0, padding = 0;
    uint64_t lock_owner = 0;
};
static_assert(sizeof(FlushIn) == 24);
struct ReleaseIn {
    uint64_t fh = 0;
    uint32_t flags = 0, release_flags = 0;
    uint64_t lock_owner = 0;
};
static_assert(sizeof(ReleaseIn) == 24);
struct FallocateIn {
    uint64_t fh = 0, offset = 0, length = 0;
    uint32_t mode = 0, padding = 0;
};
static_assert(sizeof(FallocateIn) == 32);
struct LseekIn {
    uint64_t fh = 0, offset = 0;
    uint32_t whence = 0, padding = 0;
};
static_assert(sizeof(LseekIn) == 24);
struct LseekOut {
    uint64_t offset = 0;
};
struct StatfsOut {
    uint64_t blocks = 0, bfree = 0, bavail = 0, files = 0, ffree = 0;
    uint32_t bsize = 0, namelen = 0, frsize = 0, padding = 0;
    uint32_t spare[6] = {};
};
static_assert(sizeof(StatfsOut) == 80);

/// Notifications: an OutHeader with unique 0 and the code as `error`, then the payload.
enum class Notify : int32_t { kInvalInode = 2, kResend = 7 };
struct NotifyInvalInode {
    uint64_t ino = 0;
    int64_t offset = 0;  // negative: attributes only
    int64_t length = 0;  // <= 0: to the end
};
static_assert(sizeof(NotifyInvalInode) == 24);

/// ioctls of /dev/fuse.
struct BackingMap {
    int32_t fd = -1;
    uint32_t flags = 0;
    uint64_t padding = 0;
};
static_assert(sizeof(BackingMap) == 16);
constexpr unsigned long kIocClone = 0x8004e500;         // _IOR(229, 0, uint32_t)
constexpr unsigned long kIocBackingOpen = 0x4010e501;   // _IOW(229, 1, BackingMap)
constexpr unsigned long kIocBackingClose = 0x4004e502;  // _IOW(229, 2, uint32_t)

/// FUSE over io_uring: what lies in the header page of an entry.
struct RingHeader {
    union {
        InHeader in;
        OutHeader out;
        uint8_t in_out[128] = {};
    };
    uint8_t op_in[128] = {};
    struct {
        uint64_t flags = 0, commit_id = 0;
        uint32_t payload_size = 0, padding = 0;
        uint64_t reserved = 0;
    } entry;
};
static_assert(sizeof(RingHeader) == 288);
/// At sqe->cmd.
struct RingCommand {
    uint64_t flags = 0, commit_id = 0;
    uint16_t qid = 0;
    uint8_t padding[6] = {};
};
static_assert(sizeof(RingCommand) == 24);
constexpr uint32_t kRingRegister = 1, kRingCommitAndFetch = 2;  // sqe->cmd_op

}  // namespace gantry::fuse
