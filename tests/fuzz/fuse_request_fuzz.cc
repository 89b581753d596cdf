// Fuzz target: requests as a broken kernel, or one that somebody pretends to be, might send them to a file export.
// Byte 0 chooses the export's options; then each request: a byte of choices, its header, its own struct, its data.

#include <boost/json/parse.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "block/graph.h"
#include "fuse/init.h"
#include "fuse/service.h"
#include "tests/fuzz/input.h"
#include "tests/support/memory_node.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::fuse;
using gantry::fuzz::Input;

namespace {

constexpr uint64_t kSize = 65536 + 123;
constexpr uint64_t kLargest = 4 << 20;  // what the node may grow to
constexpr uint32_t kRoom = 65536;

struct World {
    World() {
        disk->resize(kSize);
        runtime.run(open());
    }
    Task<void> open() {
        auto added = co_await graph.add(
            json::parse(R"({"driver":"memory","node-name":"n","disk":"fuzz","discard":"unmap"})").as_object());
        EXPECT(added.has_value());
        block::RootOptions options;
        options.perms.need = block::Perm::kConsistentRead | block::Perm::kWrite;
        options.user = "the fuzzer";
        auto attached = co_await graph.attach(**added, std::move(options));
        EXPECT(attached.has_value());
        root = std::move(*attached);
        channel = co_await root->channel(Loop::current());
    }
    Task<Result<>> resize(uint64_t size, bool grow_only) {
        if (size > kLargest) co_return fail(ErrorKind::kNoSpace, "the node is not to become that large");
        co_return co_await graph.resize(root->node(), static_cast<int64_t>(size), grow_only);
    }

    test::TestRuntime runtime{RuntimeOptions{IoBackendKind::kEpoll, 0, 2}};
    std::shared_ptr<test::MemoryDisk> disk = test::MemoryDisk::named("fuzz");
    std::vector<block::Driver> drivers{test::kMemoryDriver};
    // Never closed: the process ends with it.
    block::Graph& graph = *new block::Graph(*runtime.runtime, drivers, nullptr);
    std::unique_ptr<block::Root> root;
    block::Channel* channel = nullptr;
};

bool never_answered(Opcode opcode) {
    return opcode == Opcode::kForget || opcode == Opcode::kBatchForget || opcode == Opcode::kInterrupt ||
           opcode == Opcode::kNotifyReply;
}

void check_init(const Call& call, uint8_t choices) {
    const InitIn in = parse_init(call.args);
    const InitWishes wishes{.cached = (choices & 1) != 0,
                            .passthrough = (choices & 2) != 0,
                            .io_uring = (choices & 4) != 0,
                            .max_write = in.unused[0]};
    const InitAnswer answer = negotiate(in, wishes);
    EXPECT(answer.out_size <= sizeof answer.out && answer.error >= 0 && answer.error < 512);
    EXPECT((answer.error != 0) == (answer.out_size == 0));
    if (!answer.agreed) return;
    EXPECT((answer.out.flags & ~in.flags) == 0);
    EXPECT((answer.out.flags2 & ~in.flags2) == 0);
    EXPECT(answer.out.minor <= in.minor && answer.out.max_write >= 4096 && answer.out.max_write <= kMaxWrite);
    const auto back = Negotiated::load(answer.agreed->save());
    EXPECT(back && *back == *answer.agreed);
}

/// One request: made from the input, checked, answered; what must hold of any answer.
Task<void> one(World* world, FileService* service, Input* input, bool writable) {
    const uint8_t choices = input->byte();
    Call call;
    input->fill(&call.header, sizeof call.header);
    // Mostly one of the operations there are, on the node there is.
    if (choices & 1) call.header.opcode %= 54;
    if (choices & 2) call.header.nodeid = kRootNode;
    if (choices & 4) call.header.total_extlen = 0;
    const size_t own = choices & 8 ? input->byte() : 104;
    std::vector<uint8_t> args(call.opcode() == Opcode::kWrite && (choices & 16) ? sizeof(WriteIn) : own);
    input->fill(args.data(), args.size());
    uint32_t data_size = 0;
    Buffer room = Buffer::alloc(kRoom);
    if (call.opcode() == Opcode::kWrite) {
        uint16_t size = 0;
        input->fill(&size, sizeof size);
        data_size = size;
        std::memset(room.data(), choices, data_size);
        // As a kernel would say it.
        if ((choices & 32) && args.size() >= sizeof(WriteIn)) {
            const uint32_t told = data_size;
            std::memcpy(args.data() + offsetof(WriteIn, size), &told, sizeof told);
        }
    }
    const uint64_t received = sizeof(InHeader) + args.size() + data_size;
    if (choices & 64) call.header.len = static_cast<uint32_t>(received);
    call.args = args;
    call.room = room.data();
    call.room_size = kRoom;
    call.data_size = data_size;

    const CallFault fault = check_call(call, received);
    EXPECT((fault == CallFault::kBroken) == (call.header.len != received));
    if (fault != CallFault::kNone) co_return;
    if (call.opcode() == Opcode::kInit) check_init(call, choices);

    const uint64_t size = world->disk->size();
    const int64_t mtime = service->attributes().mtime_ns();
    if (!service->try_answer(call, *world->channel)) co_await service->answer(call, *world->channel);
    EXPECT(call.error <= 0 && call.error > -512);
    EXPECT(call.error != -ENOSYS || call.opcode() != Opcode::kFallocate);
    EXPECT(call.silent == never_answered(call.opcode()));
    EXPECT(call.error == 0 || call.reply_size == 0);
    EXPECT(call.reply_size <= (call.in_room ? call.room_size : sizeof(Call::Body)));
    EXPECT(!call.in_room || call.opcode() == Opcode::kRead);
    EXPECT(world->disk->size() <= kLargest);
    if (!writable) EXPECT(world->disk->size() == size && service->attributes().mtime_ns() == mtime);
    if (world->disk->size() != size) EXPECT(service->attributes().mtime_ns() > mtime);
    if (call.opcode() == Opcode::kRead && call.error == 0) {
        const auto in = call.arguments<ReadIn>();
        EXPECT(call.reply_size == (in.offset >= size ? 0 : std::min<uint64_t>(in.size, size - in.offset)));
    }
    if (call.opcode() == Opcode::kWrite && call.error == 0) {
        const uint32_t asked = call.arguments<WriteIn>().size;
        EXPECT(call.body.write.size <= asked && (call.body.write.size != 0 || asked == 0));
    }
    if (call.opcode() == Opcode::kLseek && call.error == 0)
        EXPECT(call.body.lseek.offset >= call.arguments<LseekIn>().offset && call.body.lseek.offset <= size);
    if (call.opcode() == Opcode::kGetattr && call.error == 0) EXPECT(call.body.attr.attr.size == size);
}

Task<void> talk(World* world, Input input) {
    const uint8_t choice = input.byte();
    ServiceOptions options{.writable = (choice & 1) != 0,
                           .growable = (choice & 3) == 3,
                           .honour_o_trunc = (choice & 4) != 0,
                           .allow_other = (choice & 8) != 0,
                           .cached = (choice & 17) == 16};
    options.resize = [world](uint64_t size, bool grow_only) { return world->resize(size, grow_only); };
    options.allocated = [world] { return allocated_bytes(world->root->node().shared_from_this()); };
    if (world->disk->size() != kSize) {
        const Result<> cut = co_await world->resize(kSize, false);
        EXPECT(cut.has_value());
    }
    const bool writable = options.writable;
    FileService service(world->runtime.main_loop(), std::move(options));
    if (choice & 32) service.set_backing(5, world->disk->fd());
    if (choice & 64) service.hurry();
    std::vector<uint8_t> before;
    if (!writable) before = world->disk->bytes(0, kSize);
    while (!input.empty()) co_await one(world, &service, &input, writable);
    if (!writable) EXPECT(world->disk->bytes(0, kSize) == before);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static World& world = *new World;
    world.runtime.run(talk(&world, Input(data, size)));
    return 0;
}
