// Any bytes as a disk with partitions. The first byte chooses how large the disk is beyond what there is of it.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cli/partition_table.h"
#include "runtime/check.h"

using namespace gantry;
using namespace gantry::cli;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const uint64_t disk = (uint64_t{size} - 1) << (data[0] % 24);
    const std::span<const uint8_t> bytes(data + 1, size - 1);
    size_t reads = 0;
    const DiskReader read = [&](uint64_t offset, std::span<uint8_t> room) -> Result<> {
        CHECK(room.size() <= disk && offset <= disk - room.size(), "nothing is read beyond the end");
        CHECK(room.size() <= 1 << 20, "the memory for a table is bounded");
        CHECK(++reads < 200, "the work is bounded");
        std::ranges::fill(room, uint8_t{0});
        if (offset < bytes.size()) {
            std::memcpy(room.data(), bytes.data() + offset, std::min<size_t>(room.size(), bytes.size() - offset));
        }
        return {};
    };
    const auto table = read_partition_table(read, disk);
    if (!table) {
        CHECK(table.error().message().size() < 300, "an error is a sentence");
        return 0;
    }
    for (const Partition& partition : table->partitions) {
        CHECK(partition.size > 0 && partition.offset > 0, "a partition has room, and does not hold its table");
        CHECK(partition.offset < disk && partition.size <= disk - partition.offset, "a partition lies on the disk");
        CHECK(std::ranges::none_of(partition.name, [](char c) { return static_cast<unsigned char>(c) < 0x20; }),
              "names can be printed");
        CHECK(find_partition(*table, partition.number, "disk").has_value(), "what is listed is found");
    }
    (void)find_partition(*table, 0xffffffff, "disk");
    return 0;
}
