// Opening, the table, space, flush and resize. Requests: block_format_io.cc.

#include "tests/support/block_format.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "block/align.h"

namespace gantry::test {

using block::align_up;
using block::Node;
using block::Request;

namespace {

constexpr uint64_t kMagic = 0x314b4c4247544e47;
constexpr uint64_t kTableOffset = BlockFormat::kBlock;
constexpr uint64_t kMaxBlocks = 1 << 20;
constexpr size_t kHeaderBytes = 32;

void put(uint8_t* to, uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) to[i] = static_cast<uint8_t>(value >> (8 * i));
}

uint64_t get(const uint8_t* from, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = bytes; i > 0; i--) value = value << 8 | from[i - 1];
    return value;
}

void encode_header(const BlockFormat::Header& h, uint8_t* to) {
    put(to, kMagic, 8);
    put(to + 8, h.size, 8);
    put(to + 16, h.capacity, 8);
    put(to + 24, h.key, 8);
}

Result<BlockFormat::Header> decode_header(const uint8_t* from) {
    if (get(from, 8) != kMagic) return fail(ErrorKind::kInvalid, "Image is not in blocks format");
    const BlockFormat::Header h{get(from + 8, 8), get(from + 16, 8), get(from + 24, 8)};
    if (h.capacity > kMaxBlocks || h.size > h.capacity * BlockFormat::kBlock) {
        return fail(ErrorKind::kCorrupt, "size {} does not fit {} blocks", h.size, h.capacity);
    }
    return h;
}

void encode_entry(const BlockFormat::Entry& e, uint8_t* to) {
    put(to, e.host, 8);
    put(to + 8, e.alloc, 2);
    put(to + 10, e.zero, 2);
    put(to + 12, e.shared, 2);
    put(to + 14, e.encoded, 2);
}

Result<BlockFormat::Entry> decode_entry(const uint8_t* from, uint64_t data_offset) {
    BlockFormat::Entry e;
    e.host = get(from, 8);
    e.alloc = static_cast<uint16_t>(get(from + 8, 2));
    e.zero = static_cast<uint16_t>(get(from + 10, 2));
    e.shared = get(from + 12, 2) != 0;
    e.encoded = static_cast<uint16_t>(get(from + 14, 2));
    const bool placed = e.host >= data_offset && e.host % BlockFormat::kBlock == 0;
    if ((e.host && !placed) || (!e.host && (e.alloc || e.encoded)) || (e.alloc & e.zero)) {
        return fail(ErrorKind::kCorrupt, "table entry with host {} and sub-blocks {:x}/{:x}", e.host, e.alloc, e.zero);
    }
    return e;
}

}  // namespace

uint64_t BlockFormat::Header::data_offset() const { return kTableOffset + align_up(capacity * kEntryBytes, kBlock); }

void BlockFormat::create(MemoryDisk& disk, uint64_t size, uint64_t max_size, uint64_t key) {
    const Header header{size, align_up(align_up(max_size, kBlock) / kBlock, kPageEntries), key};
    uint8_t bytes[kHeaderBytes];
    encode_header(header, bytes);
    disk.write(0, bytes, sizeof bytes);
    disk.resize(header.data_offset());
}

std::string BlockFormat::check(const MemoryDisk& disk) {
    const auto head = disk.bytes(0, kHeaderBytes);
    const Result<Header> header = decode_header(head.data());
    if (!header) return header.error().message();
    std::set<uint64_t> used;
    for (uint64_t i = 0; i < header->capacity; i++) {
        const auto bytes = disk.bytes(kTableOffset + i * kEntryBytes, kEntryBytes);
        const Result<Entry> e = decode_entry(bytes.data(), header->data_offset());
        if (!e) return e.error().message();
        if (!e->host) continue;
        if (!used.insert(e->host).second) return fmt::format("block {} shares its place {} with another", i, e->host);
        if (e->host >= align_up(disk.size(), kBlock)) return fmt::format("block {} lies beyond the file", i);
    }
    return {};
}

BlockFormat::BlockFormat(const block::OpenContext& context, Header header)
    : FormatNode("blocks", context.node_name(), context.flags()),
      header_(header),
      write_through_(context.options().flag("write-through")),
      forget_(context.options().flag("forget")),
      entries_(header.capacity),
      page_loaded_(header.capacity / kPageEntries),
      page_dirty_(header.capacity / kPageEntries) {
    limits_.supports_zeroes = true;
    limits_.zeroes_alignment = kSub;
    limits_.discard_alignment = kSub;
    limits_.optimal_transfer = kBlock;
    set_size(header.size);
    recycle_places();
    allow_fast_paths(true, true);
}

Task<Result<>> BlockFormat::load_space(Node& file) {
    // Free places are those between data that no entry names; what a crash leaked is found again so.
    std::vector<uint8_t> table(header_.capacity * kEntryBytes);
    Request rq = Request::internal();
    const iovec iov{table.data(), table.size()};
    CO_CHECK(co_await file.read(rq, kTableOffset, IoVec(iov)));
    std::set<uint64_t> used;
    for (uint64_t i = 0; i < header_.capacity; i++) {
        CO_TRY(const Entry e, decode_entry(table.data() + i * kEntryBytes, header_.data_offset()));
        if (e.host) used.insert(e.host);
    }
    next_host_ = std::max(align_up(file.size(), kBlock), header_.data_offset());
    for (uint64_t host = header_.data_offset(); host < next_host_; host += kBlock) {
        if (!used.contains(host)) free_.push_back(host);
    }
    co_return Result<>();
}

// ---- The table ----

bool BlockFormat::loaded(uint64_t index) {
    std::lock_guard lock(table_mutex_);
    return page_loaded_[index / kPageEntries];
}

BlockFormat::Entry BlockFormat::entry(uint64_t index) {
    std::lock_guard lock(table_mutex_);
    return entries_[index];
}

void BlockFormat::set_entry(uint64_t index, const Entry& e) {
    std::lock_guard lock(table_mutex_);
    entries_[index] = e;
    page_dirty_[index / kPageEntries] = 1;
}

Task<Result<>> BlockFormat::load_page(Request& rq, uint64_t page) {
    auto guard = co_await load_mutex_.lock();
    if (loaded(page * kPageEntries)) co_return Result<>();
    std::array<uint8_t, kPageBytes> bytes;
    const iovec iov{bytes.data(), bytes.size()};
    CO_CHECK(co_await file().read(rq, kTableOffset + page * kPageBytes, IoVec(iov)));
    std::array<Entry, kPageEntries> decoded;
    for (uint64_t i = 0; i < kPageEntries; i++) {
        CO_TRY(decoded[i], decode_entry(bytes.data() + i * kEntryBytes, header_.data_offset()));
    }
    std::lock_guard lock(table_mutex_);
    std::ranges::copy(decoded, entries_.begin() + static_cast<ptrdiff_t>(page * kPageEntries));
    page_loaded_[page] = 1;
    co_return Result<>();
}

Task<Result<>> BlockFormat::load_range(Request& rq, uint64_t offset, uint64_t length) {
    if (length == 0) co_return Result<>();
    for (uint64_t page = offset / kBlock / kPageEntries; page <= (offset + length - 1) / kBlock / kPageEntries;
         page++) {
        CO_CHECK(co_await load_page(rq, page));
    }
    co_return Result<>();
}

std::array<uint8_t, BlockFormat::kPageBytes> BlockFormat::page_bytes(uint64_t page) {
    std::array<uint8_t, kPageBytes> bytes;
    std::lock_guard lock(table_mutex_);
    for (uint64_t i = 0; i < kPageEntries; i++) {
        encode_entry(entries_[page * kPageEntries + i], bytes.data() + i * kEntryBytes);
    }
    page_dirty_[page] = 0;
    return bytes;
}

Task<Result<>> BlockFormat::write_page(Request& rq, uint64_t page) {
    const std::array<uint8_t, kPageBytes> bytes = page_bytes(page);
    const iovec iov{const_cast<uint8_t*>(bytes.data()), bytes.size()};
    Result<> written = co_await file().write(rq, kTableOffset + page * kPageBytes, IoVec(iov));
    if (!written) {
        std::lock_guard lock(table_mutex_);
        page_dirty_[page] = 1;
    }
    co_return written;
}

Task<Result<>> BlockFormat::write_through(Request& rq, Undo undo) {
    if (!write_through_) co_return Result<>();
    std::set<uint64_t> pages;
    for (const auto& [index, old] : undo) pages.insert(index / kPageEntries);
    for (const uint64_t page : pages) {
        Result<> written = co_await write_page(rq, page);
        if (written) continue;
        for (const auto& [index, old] : undo) set_entry(index, old);
        co_return written;
    }
    co_return Result<>();
}

// ---- Space ----

uint64_t BlockFormat::take_blocks(unsigned& count, bool& fresh) {
    std::lock_guard lock(space_mutex_);
    fresh = free_.empty();
    if (!fresh) {
        count = 1;
        const uint64_t host = free_.back();
        free_.pop_back();
        return host;
    }
    return std::exchange(next_host_, next_host_ + count * kBlock);
}

void BlockFormat::give_back(uint64_t host, unsigned count) {
    std::lock_guard lock(space_mutex_);
    for (unsigned i = 0; i < count; i++) free_.push_back(host + i * kBlock);
}

void BlockFormat::free_later(uint64_t host) {
    {
        std::lock_guard lock(space_mutex_);
        retiring_++;
    }
    retire([this, host] {
        std::lock_guard lock(space_mutex_);
        retiring_--;
        awaiting_flush_.push_back(host);
    });
}

size_t BlockFormat::retired_blocks() const {
    std::lock_guard lock(space_mutex_);
    return retiring_ + awaiting_flush_.size();
}

size_t BlockFormat::free_blocks() const {
    std::lock_guard lock(space_mutex_);
    return free_.size();
}

// ---- Flush, resize, sharing ----

Task<Result<>> BlockFormat::flush_metadata(Request& rq) {
    auto flushing = co_await flush_mutex_.lock();
    std::vector<std::pair<uint64_t, std::array<uint8_t, kPageBytes>>> pages;
    std::vector<uint64_t> freed;
    auto guard = co_await alloc_mutex_.lock();
    {
        for (uint64_t page = 0; page < page_dirty_.size(); page++) {
            bool dirty = false;
            {
                std::lock_guard lock(table_mutex_);
                dirty = page_dirty_[page];
            }
            if (dirty) pages.emplace_back(page, page_bytes(page));
        }
        std::lock_guard lock(space_mutex_);
        std::swap(freed, awaiting_flush_);
    }
    // With write-through others write pages under alloc_mutex_: what was collected must not overtake theirs.
    if (!write_through_) guard.unlock();
    // Data (which these pages name) -> table -> reuse of what the table no longer names.
    Result<> result = co_await data().flush(rq);
    for (size_t i = 0; result && i < pages.size(); i++) {
        const iovec iov{pages[i].second.data(), kPageBytes};
        result = co_await file().write(rq, kTableOffset + pages[i].first * kPageBytes, IoVec(iov));
    }
    if (result) result = co_await file().flush(rq);

    if (!guard) guard = co_await alloc_mutex_.lock();
    std::scoped_lock lock(table_mutex_, space_mutex_);
    if (!result) {
        for (const auto& [page, bytes] : pages) page_dirty_[page] = 1;
        awaiting_flush_.insert(awaiting_flush_.end(), freed.begin(), freed.end());
        co_return result;
    }
    free_.insert(free_.end(), freed.begin(), freed.end());
    if (forget_) {
        for (size_t page = 0; page < page_dirty_.size(); page++) {
            if (!page_dirty_[page]) page_loaded_[page] = 0;
        }
    }
    co_return Result<>();
}

Task<Result<>> BlockFormat::do_resize(uint64_t new_size) {
    if (new_size > header_.capacity * kBlock) {
        co_return fail(ErrorKind::kNoSpace, "node '{}': the table has room for {} blocks", name(), header_.capacity);
    }
    Request rq = Request::internal();
    const uint64_t old_size = size();
    const uint64_t from = std::min(old_size, new_size);
    const uint64_t to = align_up(std::max(old_size, new_size), kBlock);
    CO_CHECK(co_await load_range(rq, from, to - from));
    bool partly_encoded = false;
    {
        // Whole sub-blocks beyond the shorter end read as zeroes from now on, whatever is in the backing file.
        auto guard = co_await alloc_mutex_.lock();
        for (uint64_t index = from / kBlock; index < to / kBlock; index++) {
            Entry e = entry(index);
            const uint64_t begin = index * kBlock;
            if (e.encoded && begin < from) {
                partly_encoded = true;
                continue;
            }
            uint16_t beyond = 0;
            for (unsigned sub = 0; sub < kSubs; sub++) {
                if (begin + sub * kSub >= from) beyond |= static_cast<uint16_t>(1u << sub);
            }
            if (begin >= from) {
                if (e.host && !e.shared) free_later(e.host);
                e = Entry{};
            }
            e.alloc &= static_cast<uint16_t>(~beyond);
            e.zero |= beyond;
            set_entry(index, e);
        }
    }
    set_size(new_size);
    if (new_size > old_size) {
        const uint64_t unit = partly_encoded ? kBlock : kSub;
        const uint64_t end = std::min(align_up(old_size, unit), new_size);
        if (end > old_size) {
            Result<> zeroed = co_await write_zeroes(rq, old_size, end - old_size, block::WriteFlags::kNone);
            if (!zeroed) {
                set_size(old_size);
                co_return zeroed;
            }
        }
    }
    header_.size = new_size;
    CO_CHECK(co_await flush_metadata(rq));
    std::array<uint8_t, kHeaderBytes> bytes;
    encode_header(header_, bytes.data());
    const iovec iov{bytes.data(), bytes.size()};
    CO_CHECK(co_await file().write(rq, 0, IoVec(iov)));
    co_return co_await file().flush(rq);
}

Task<Result<>> BlockFormat::share_all() {
    Request rq = Request::internal();
    CO_CHECK(co_await load_range(rq, 0, header_.capacity * kBlock));
    auto guard = co_await alloc_mutex_.lock();
    for (uint64_t index = 0; index < header_.capacity; index++) {
        Entry e = entry(index);
        if (!e.host || e.shared) continue;
        e.shared = true;
        set_entry(index, e);
    }
    co_return Result<>();
}

namespace {

Task<Result<std::shared_ptr<Node>>> open_blocks(block::OpenContext& context) {
    CO_TRY(Node* const file, co_await context.open_child("file", block::ChildRole::kFile));
    if (context.child_given("backing")) CO_CHECK(co_await context.open_child("backing", block::ChildRole::kBacking));
    std::array<uint8_t, kHeaderBytes> bytes;
    const iovec iov{bytes.data(), bytes.size()};
    Request rq = Request::internal();
    CO_CHECK(co_await file->read(rq, 0, IoVec(iov)));
    CO_TRY(const BlockFormat::Header header, decode_header(bytes.data()));
    auto node = std::make_shared<BlockFormat>(context, header);
    CO_CHECK(co_await node->load_space(*file));
    co_return node;
}

}  // namespace

constinit const block::Driver kBlockFormatDriver{.name = "blocks", .open = open_blocks};

}  // namespace gantry::test
