// FuseServiceFixture: a FileService over a node, and the kernel's side of single requests. Header only.

#pragma once

#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "block/formats/qcow2/qcow2.h"
#include "block/protocols/file.h"
#include "fuse/service.h"
#include "runtime/blocking_pool.h"
#include "tests/support/graph_fixture.h"

namespace gantry::test {

/// A request with memory of its own, as a transport makes it.
struct FuseRequest {
    template <class In>
    FuseRequest(fuse::Opcode opcode, const In& in, std::vector<uint8_t> payload = {}, uint32_t room_size = 0)
        : args(sizeof in), room(Buffer::alloc(std::max<size_t>(payload.size(), room_size))) {
        std::memcpy(args.data(), &in, sizeof in);
        begin(opcode, payload, room_size);
    }
    explicit FuseRequest(fuse::Opcode opcode) : room(Buffer::alloc(0)) { begin(opcode, {}, 0); }

    void begin(fuse::Opcode opcode, const std::vector<uint8_t>& payload, uint32_t room_size) {
        call.header.opcode = static_cast<uint32_t>(opcode);
        call.header.nodeid = fuse::kRootNode;
        call.header.unique = 2;
        call.header.len = static_cast<uint32_t>(sizeof call.header + args.size() + payload.size());
        call.args = args;
        call.room = room.data();
        call.room_size = std::max(room_size, static_cast<uint32_t>(payload.size()));
        call.data_size = static_cast<uint32_t>(payload.size());
        if (!payload.empty()) std::memcpy(room.data(), payload.data(), payload.size());
    }

    /// On the channel's loop.
    static Task<void> answer(FuseRequest* self, fuse::FileService* service, block::Channel* channel) {
        if (fuse::check_call(self->call, self->call.header.len) != fuse::CallFault::kNone)
            throw std::logic_error("the test made a request that no kernel makes");
        self->at_once = service->try_answer(self->call, *channel);
        if (!self->at_once) co_await service->answer(self->call, *channel);
    }

    int error() const { return -call.error; }
    template <class Out>
    Out out() const {
        if (call.error != 0 || call.in_room || call.reply_size != sizeof(Out))
            throw std::logic_error("another answer than expected: error " + std::to_string(call.error) + ", " +
                                   std::to_string(call.reply_size) + " bytes");
        Out value;
        std::memcpy(&value, &call.body, sizeof value);
        return value;
    }
    std::vector<uint8_t> data() const {
        if (call.error != 0) throw std::logic_error("no data: error " + std::to_string(call.error));
        return {call.room, call.room + call.reply_size};
    }

    std::vector<uint8_t> args;
    Buffer room;
    fuse::Call call;
    bool at_once = false;
};

struct FuseServiceFixture : GraphFixture {
    FuseServiceFixture() : GraphFixture(nullptr, {block::kFileDriver, block::kQcow2Driver}) {}
    ~FuseServiceFixture() { close(); }

    /// Opens definitions in order; the last one, named "n", becomes the file. `options` without their functions.
    void open(std::vector<std::string> definitions, fuse::ServiceOptions options, bool writethrough = false) {
        for (const std::string& definition : definitions) {
            const std::string error = add(definition);
            if (!error.empty()) throw std::runtime_error(definition + ": " + error);
        }
        block::RootOptions user = options.writable ? writer("the file") : reader("the file");
        user.perms.share = block::Perm::kAll;
        user.writethrough = writethrough;
        user.on_resize = [this](uint64_t) {
            if (service) service->touched();
        };
        root = attach("n", std::move(user));
        for (size_t i = 0; i < runtime.io_loop_count(); i++) channels.push_back(run(root->channel(runtime.io_loop(i))));
        options.resize = [this](uint64_t size, bool grow_only) {
            ++resizes;
            return graph->resize(root->node(), static_cast<int64_t>(size), grow_only);
        };
        service = std::make_unique<fuse::FileService>(runtime.main_loop(), std::move(options));
    }
    void close() {
        service.reset();
        channels.clear();
        if (root) detach(std::move(root));
    }

    FuseRequest ask(FuseRequest request, size_t loop = 0) {
        auto kept = std::make_unique<FuseRequest>(std::move(request));
        const size_t i = loop % channels.size();
        runtime.run_on_io(FuseRequest::answer(kept.get(), service.get(), channels[i]), i);
        return std::move(*kept);
    }
    template <class In>
    FuseRequest ask(fuse::Opcode opcode, const In& in) {
        return ask(FuseRequest(opcode, in));
    }
    FuseRequest ask(fuse::Opcode opcode) { return ask(FuseRequest(opcode)); }

    FuseRequest read(uint64_t offset, uint32_t size, uint32_t room = 1 << 20) {
        return ask(FuseRequest(fuse::Opcode::kRead, fuse::ReadIn{.offset = offset, .size = size}, {}, room));
    }
    FuseRequest write(uint64_t offset, std::vector<uint8_t> data, uint32_t write_flags = 0) {
        const auto size = static_cast<uint32_t>(data.size());
        return ask(FuseRequest(fuse::Opcode::kWrite,
                               fuse::WriteIn{.offset = offset, .size = size, .write_flags = write_flags},
                               std::move(data)));
    }
    FuseRequest open_file(uint32_t flags) { return ask(fuse::Opcode::kOpen, fuse::OpenIn{.flags = flags}); }
    fuse::Attr attr() { return ask(fuse::Opcode::kGetattr, fuse::GetattrIn{}).out<fuse::AttrOut>().attr; }
    FuseRequest set(uint32_t valid, fuse::SetattrIn in = {}) {
        in.valid = valid;
        return ask(fuse::Opcode::kSetattr, in);
    }
    FuseRequest truncate(uint64_t size) { return set(fuse::kSetSize, {.size = size}); }
    FuseRequest fallocate(uint32_t mode, uint64_t offset, uint64_t length) {
        return ask(fuse::Opcode::kFallocate, fuse::FallocateIn{.offset = offset, .length = length, .mode = mode});
    }
    /// The place, or -errno.
    int64_t seek(uint64_t offset, uint32_t whence) {
        const FuseRequest r = ask(fuse::Opcode::kLseek, fuse::LseekIn{.offset = offset, .whence = whence});
        return r.error() ? -r.error() : static_cast<int64_t>(r.out<fuse::LseekOut>().offset);
    }

    std::unique_ptr<block::Root> root;
    std::vector<block::Channel*> channels;
    std::unique_ptr<fuse::FileService> service;
    unsigned resizes = 0;
};

}  // namespace gantry::test
