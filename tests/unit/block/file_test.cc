#include "block/protocols/file.h"

#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "block/protocols/file_alignment.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "tests/unit/block/child_process.h"
#include "tests/unit/block/file_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;
using Catch::Contains;
using Catch::StartsWith;

namespace {

constexpr size_t kMiB = 1 << 20;

std::string pattern(size_t bytes, unsigned seed) {
    std::string text(bytes, 0);
    uint32_t x = seed * 2654435761u + 1;
    for (char& c : text) {
        x = x * 1664525u + 1013904223u;
        c = static_cast<char>(x >> 24);
    }
    return text;
}

/// O_ACCMODE and O_DIRECT of the descriptor of the node.
int mode_of(Node& node) {
    auto plain = node.passthrough();
    return plain ? ::fcntl(plain->fd, F_GETFL) & (O_ACCMODE | O_DIRECT) : -1;
}

bool takes_o_direct(const std::string& path) {
    return static_cast<bool>(UniqueFd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC)));
}

Task<int> try_read_once(Node* node, uint64_t offset, std::string* into) {
    Request rq = Request::internal();
    const iovec one{into->data(), into->size()};
    co_return node->try_read(rq, offset, IoVec(one));
}

}  // namespace

TEST_CASE("file: what cannot be opened is refused with the reference's words", "[file][open]") {
    FileFixture f;
    const std::string missing = f.dir.file("missing"), folder = f.dir.file("folder"), fifo = f.dir.file("fifo");
    std::filesystem::create_directory(folder);
    REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
    write_file(f.dir.file("img"), "x");
    const auto open = [&](const std::string& name, json::object more) {
        more["driver"] = "file";
        more["node-name"] = "f";
        more["filename"] = name;
        return f.refused(std::move(more));
    };
    for (const bool read_only : {false, true}) {
        const json::object ro{{"read-only", read_only}};
        CHECK(open(missing, ro) == "Could not open '" + missing + "': No such file or directory");
        CHECK(open("file:" + missing, ro) == "Could not open '" + missing + "': No such file or directory");
        CHECK(open(folder, ro) == "Could not open '" + folder + "': Is a directory");
        CHECK(open(fifo, ro) == "'file' driver requires '" + fifo + "' to be a regular file");
        CHECK_THAT(open("/dev/null", ro), StartsWith("'file' driver requires '/dev/null' to be a regular file"));
    }
    CHECK_THAT(open("missing", {}), StartsWith("Could not open 'missing': No such file or directory; relative to"));
    CHECK(open("", {}) == "The 'file' block driver requires a file name");
    CHECK_THAT(open(std::string("a\0b", 3), {}), Contains("zero byte"));
    CHECK(open(f.dir.file("img"), {{"aio", "native"}}) ==
          "aio=native was specified, but it requires cache.direct=on, which was not specified.");
    CHECK_THAT(open(f.dir.file("img"), {{"pr-manager", "pr0"}}),
               StartsWith("No persistent reservation manager with id 'pr0'"));
    CHECK(file_bytes(f.dir.file("img")) == "x");
    CHECK_FALSE(std::filesystem::exists(missing));
}

TEST_CASE("file: what is written is read back from every loop, and the size is exact", "[file]") {
    FileFixture f;
    const std::string path = f.dir.file("img"), data = pattern(3 * kMiB + 1000, 1);
    write_file(path, std::string(1000, 'a'));
    json::object more;
    SECTION("through the page cache") {}
    SECTION("with O_DIRECT") {
        if (!takes_o_direct(path)) {
            WARN("skipped: no O_DIRECT in " << f.dir.path());
            return;
        }
        more["cache"] = json::object{{"direct", true}};
        more["aio"] = "native";
    }
    auto [node, root] = f.open_rw(path, std::move(more));
    CHECK(node->size() == 1000);
    CHECK(f.read(node, 990, 20) == std::string(10, 'a') + std::string(10, '\0'));

    // Unaligned, growing, over several loops; the middle first, so that a hole is left and filled.
    CHECK(f.run(write_text(node, 100, "xyz")) == "");
    CHECK(f.run(write_text(node, 2 * kMiB, data.substr(2 * kMiB))) == "");
    CHECK(node->size() == data.size());
    CHECK(f.read(node, 1000, 5000) == std::string(5000, '\0'));
    for (size_t i = 0; i < f.rt.io_loop_count(); ++i) {
        auto channel = f.rt.run(root->channel(f.rt.io_loop(i)));
        std::string part = data.substr(0, 2 * kMiB);
        const iovec pieces[] = {{part.data(), 1}, {part.data() + 1, 4095}, {part.data() + 4096, part.size() - 4096}};
        REQUIRE(f.rt.run_on_io(channel->write(0, IoVec(pieces, 3, part.size())), i));
        std::string back(data.size() - 777, '?');
        const iovec two[] = {{back.data(), 500}, {back.data() + 500, back.size() - 500}};
        REQUIRE(f.rt.run_on_io(channel->read(777, IoVec(two, 2, back.size())), i));
        CHECK((back == data.substr(777)));
    }
    CHECK(f.run(write_text(node, 5, "FUA", WriteFlags::kFua)) == "");
    CHECK(f.run(flush(node)) == "");
    CHECK(f.read(node, 5, 3) == "FUA");
    f.detach(std::move(root));
    f.remove();
    CHECK(std::filesystem::file_size(path) == data.size());
    CHECK((file_bytes(path).substr(8) == data.substr(8)));
}

TEST_CASE("file: try_read answers from the page cache and never waits for the disk", "[file]") {
    FileFixture f;
    const std::string path = f.dir.file("img"), data = pattern(kMiB, 2);
    write_file(path, data);
    auto [node, root] = f.open_rw(path);
    std::string back(4096, '?');
    CHECK(f.rt.run(try_read_once(node, 8192, &back)) == 0);
    CHECK((back == data.substr(8192, 4096)));
    CHECK(f.rt.run(try_read_once(node, kMiB - 100, &back)) == -EAGAIN);  // beyond the end: the request layer's business

    // Cold: either "not now", or the kernel kept the page; never wrong bytes. The coroutine always answers.
    const int fd = node->passthrough()->fd;
    REQUIRE(::fdatasync(fd) == 0);
    REQUIRE(::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    for (const uint64_t offset : {0ul, 4096ul, 524288ul, 528384ul, 532480ul}) {
        back.assign(4096, '?');
        const int r = f.rt.run(try_read_once(node, offset, &back));
        CHECK((r == 0 || r == -EAGAIN));
        if (r == 0) CHECK((back == data.substr(offset, 4096)));
        CHECK((f.read(node, offset, 4096) == data.substr(offset, 4096)));
    }
    // And sequential reads of a cold file.
    REQUIRE(::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    std::string all;
    for (size_t at = 0; at < kMiB; at += 16384) all += f.read(node, at, 16384);
    CHECK((all == data));
    f.detach(std::move(root));
}

TEST_CASE("file: a file cut short by somebody else reads as zeroes", "[file]") {
    FileFixture f;
    const std::string path = f.dir.file("img");
    write_file(path, std::string(10000, 'a'));
    auto node = f.add_file(path);
    REQUIRE(node);
    REQUIRE(::truncate(path.c_str(), 5000) == 0);
    CHECK(f.read(*node, 4990, 20) == std::string(10, 'a') + std::string(10, '\0'));
    CHECK(f.read(*node, 6000, 10) == std::string(10, '\0'));
}

TEST_CASE("file: write_zeroes makes holes when it may and keeps blocks when it must not", "[file][zero]") {
    FileFixture f;
    // tmpfs has no FALLOC_FL_ZERO_RANGE.
    const bool shm = GENERATE(false, true);
    const std::string path = shm ? fmt::format("/dev/shm/gantry-test-{}", ::getpid()) : f.dir.file("img");
    const std::string data = pattern(4 * kMiB, 3);
    write_file(path, data);
    {
        auto [node, root] = f.open_rw(path, {{"discard", "unmap"}});
        const uint64_t full = allocated_bytes(path);
        CHECK(full >= data.size());
        CHECK(f.run(zero(node, kMiB, kMiB, WriteFlags::kNoFallback)) == "");
        CHECK(allocated_bytes(path) >= data.size());
        CHECK(f.run(zero(node, 2 * kMiB, kMiB, WriteFlags::kMayUnmap | WriteFlags::kFua)) == "");
        CHECK(allocated_bytes(path) <= full - kMiB);
        CHECK(
            (f.read(node, 0, 4 * kMiB) == data.substr(0, kMiB) + std::string(2 * kMiB, '\0') + data.substr(3 * kMiB)));

        // Parts of pages, and beyond the end: longer, never shorter.
        CHECK(f.run(zero(node, 100, 1000, WriteFlags::kMayUnmap)) == "");
        CHECK(f.run(zero(node, 4 * kMiB - 10, 5000, WriteFlags::kMayUnmap)) == "");
        CHECK(node->size() == 4 * kMiB + 4990);
        CHECK(f.run(zero(node, 5 * kMiB, 123, WriteFlags::kMayUnmap)) == "");
        CHECK(f.run(zero(node, 6 * kMiB, kMiB, WriteFlags::kNone)) == "");
        CHECK(node->size() == 7 * kMiB);
        CHECK(std::filesystem::file_size(path) == 7 * kMiB);
        CHECK((f.read(node, 4 * kMiB - 20, 20) == data.substr(4 * kMiB - 20, 10) + std::string(10, '\0')));
        CHECK((f.read(node, 99, 1002) == data.substr(99, 1) + std::string(1000, '\0') + data.substr(1100, 1)));

        CHECK(f.run(discard(node, 0, kMiB)) == "");
        CHECK(f.read(node, 0, 4096) == std::string(4096, '\0'));
        const json::object stats = node->driver_stats();
        CHECK(stats.at("driver") == "file");
        CHECK(stats.at("discard-nb-ok").to_number<int>() == 1);
        CHECK(stats.at("discard-nb-failed").to_number<int>() == 0);
        CHECK(stats.at("discard-bytes-ok").to_number<uint64_t>() == kMiB);
        f.detach(std::move(root));
        f.remove();
    }
    CHECK(std::filesystem::file_size(path) == 7 * kMiB);
    if (shm) std::filesystem::remove(path);
}

TEST_CASE("file: block status knows holes, data and the end", "[file][status]") {
    FileFixture f;
    const std::string path = f.dir.file("img");
    {
        const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        const std::string data(kMiB, 'd');
        REQUIRE(::pwrite(fd.get(), data.data(), kMiB, kMiB) == static_cast<ssize_t>(kMiB));
        REQUIRE(::ftruncate(fd.get(), 3 * kMiB + 100) == 0);
    }
    auto [node, root] = f.open_rw(path, {{"discard", "unmap"}});
    const auto get = [&](uint64_t offset, uint64_t length) {
        auto r = f.rt.run(status(node, offset, length));
        REQUIRE(r);
        CHECK(r->allocated);
        CHECK(r->file == node);
        CHECK((r->has_offset && r->host_offset == offset));
        return *r;
    };
    BlockStatus s = get(0, node->size());
    CHECK((s.zero && !s.data && s.length == kMiB && !s.eof));
    s = get(kMiB, node->size() - kMiB);
    CHECK((!s.zero && s.data && s.length == kMiB));
    s = get(kMiB + 5, 10);
    CHECK((s.data && s.length == 10));
    s = get(2 * kMiB, kMiB + 100);
    CHECK((s.zero && s.length == kMiB + 100 && s.eof));
    // Neither a hole nor data is remembered beyond a change.
    CHECK(f.run(write_text(node, 0, std::string(8192, 'n'))) == "");
    s = get(0, kMiB);
    CHECK((s.data && s.length == 8192));
    CHECK(f.run(discard(node, kMiB, kMiB)) == "");
    s = get(kMiB, kMiB);
    CHECK((s.zero && s.length == kMiB));
    f.detach(std::move(root));
}

TEST_CASE("file: resize and image_info", "[file]") {
    FileFixture f;
    const std::string path = f.dir.file("img");
    write_file(path, pattern(10000, 4));
    auto node = f.add_file(path);
    REQUIRE(node);
    CHECK(f.run(f.graph.resize(**node, 123456789)) == "");
    CHECK((*node)->size() == 123456789);
    CHECK(f.read(*node, 10000, 10) == std::string(10, '\0'));
    auto info = f.rt.run((*node)->image_info());
    REQUIRE(info);
    CHECK(info->virtual_size == 123456789);
    CHECK(info->actual_size == allocated_bytes(path));
    CHECK((*node)->filename() == path);
    CHECK(f.run(f.graph.resize(**node, 10)) == "");
    CHECK(std::filesystem::file_size(path) == 10);
    CHECK(file_bytes(path) == pattern(10, 4));
}

TEST_CASE("file: with auto-read-only the file is open for writing while somebody may write", "[file][perms]") {
    FileFixture f;
    const std::string path = f.dir.file("img");
    write_file(path, pattern(8192, 5));
    auto added = f.add_file(path, {{"auto-read-only", true}});
    REQUIRE(added);
    Node& node = **added;
    CHECK(mode_of(node) == O_RDONLY);
    CHECK_FALSE(node.read_only());
    const int number = node.passthrough()->fd;

    auto reader = f.attach(node, FileFixture::kReader);
    REQUIRE(reader);
    CHECK(mode_of(node) == O_RDONLY);
    // The name may be gone by then.
    std::filesystem::rename(path, path + ".new");
    auto writer = f.attach(node, FileFixture::kWriter);
    REQUIRE(writer);
    CHECK(mode_of(node) == O_RDWR);
    CHECK(node.passthrough()->fd == number);
    CHECK(f.run(write_text(&node, 0, "written")) == "");
    f.detach(std::move(*writer));
    CHECK(mode_of(node) == O_RDONLY);
    CHECK(f.read(&node, 0, 7) == "written");
    f.detach(std::move(*reader));
}

TEST_CASE("file: requests of other loops go on while descriptors are exchanged", "[file][perms]") {
    FileFixture f;
    const std::string path = f.dir.file("img"), data = pattern(kMiB, 6);
    write_file(path, data);
    auto added = f.add_file(path, {{"auto-read-only", true}});
    REQUIRE(added);
    auto reader = f.attach(**added, FileFixture::kReader);
    REQUIRE(reader);

    struct Shared {
        std::atomic<bool> stop{false};
        std::atomic<uint64_t> reads{0}, wrong{0};
        const std::string* data;
    } shared;
    shared.data = &data;
    constexpr auto read_on = [](Channel* channel, Shared* s, unsigned seed) -> Task<void> {
        std::string back(4096, '?');
        const iovec one{back.data(), back.size()};
        for (unsigned i = seed; !s->stop.load(); ++i) {
            const uint64_t offset = (i * 7919u) % (kMiB - 4096);
            Result<> r;
            while (channel->quiesced()) co_await channel->resumed();
            const int now = channel->try_read(offset, IoVec(one));
            if (now == -EAGAIN) {
                r = co_await channel->read(offset, IoVec(one), true);
            }
            if ((now != 0 && now != -EAGAIN) || !r || back != s->data->substr(offset, 4096)) ++s->wrong;
            ++s->reads;
            co_await yield_turn();
        }
    };
    constexpr auto on_loop = [](Loop* loop, Channel* channel, decltype(read_on) body, Shared* s,
                                unsigned seed) -> Task<void> { co_await run_on(*loop, body(channel, s, seed)); };
    constexpr auto exchange = [](FileFixture* fx, Node* node, Root* root, decltype(on_loop) start,
                                 decltype(read_on) body, Shared* s) -> Task<unsigned> {
        TaskScope scope;
        for (size_t i = 0; i < fx->rt.io_loop_count(); ++i) {
            Channel* channel = co_await root->channel(fx->rt.io_loop(i));
            scope.spawn(start(&fx->rt.io_loop(i), channel, body, s, static_cast<unsigned>(i)));
        }
        unsigned done = 0;
        for (; done < 50; ++done) {
            RootOptions options;
            options.perms = {FileFixture::kWriter, Perm::kAll};
            options.user = "the test";
            auto writer = co_await fx->graph.attach(*node, std::move(options));
            if (!writer) break;
            const uint64_t seen = s->reads.load();
            if (!co_await wait_until([s, seen] { return s->reads.load() > seen; })) break;
            co_await fx->graph.detach(std::move(*writer));
        }
        s->stop = true;
        co_await scope.join();
        co_return done;
    };
    CHECK(f.rt.run(exchange(&f, *added, reader->get(), on_loop, read_on, &shared)) == 50);
    CHECK(shared.wrong == 0);
    CHECK(mode_of(**added) == O_RDONLY);
    f.detach(std::move(*reader));
}

TEST_CASE("file: what cannot be written falls back to read-only when it may", "[file][perms]") {
    FileFixture f;
    // A program that runs cannot be opened for writing, not even by root.
    const std::string path = f.dir.file("sleep");
    std::error_code ec;
    if (!std::filesystem::copy_file("/bin/sleep", path, ec)) {
        WARN("skipped: no /bin/sleep to run");
        return;
    }
    ChildProcess running({path, "600"});
    REQUIRE(f.rt.run(wait_until([&] { return !UniqueFd(::open(path.c_str(), O_RDWR | O_CLOEXEC)); })));

    CHECK(f.refused({{"driver", "file"}, {"node-name", "f"}, {"filename", path}}) ==
          "Could not open '" + path + "': Text file busy; read-only=on opens it for reading");
    auto node = f.add_file(path, {{"auto-read-only", true}});
    REQUIRE(node);
    if ((*node)->read_only()) {
        auto writer = f.attach(**node, FileFixture::kWriter);
        REQUIRE_FALSE(writer);
        CHECK(writer.error().kind() == ErrorKind::kReadOnly);
    } else {
        // The kernel says so only when it is opened: the writer is refused, the node stays as it is.
        auto writer = f.attach(**node, FileFixture::kWriter);
        REQUIRE_FALSE(writer);
        CHECK_THAT(writer.error().message(), Contains("Text file busy"));
    }
    CHECK(mode_of(**node) == O_RDONLY);
    auto reader = f.attach(**node, FileFixture::kReader);
    REQUIRE(reader);
    CHECK(f.read(*node, 1, 3) == "ELF");
    f.detach(std::move(*reader));
}

TEST_CASE("file: reopen changes the cache mode and notices growth, and no file name", "[file][reopen]") {
    FileFixture f;
    const std::string path = f.dir.file("img"), data = pattern(kMiB, 7);
    write_file(path, data);
    if (!takes_o_direct(path)) {
        WARN("skipped: no O_DIRECT in " << f.dir.path());
        return;
    }
    auto [node, root] = f.open_rw(path);
    const auto reopen = [&](json::object more) {
        more["driver"] = "file";
        more["node-name"] = "f";
        if (!more.contains("filename")) more["filename"] = path;
        return f.run(f.graph.reopen({more}));
    };
    CHECK(mode_of(*node) == O_RDWR);
    CHECK(reopen({{"cache", {{"direct", true}}}, {"aio", "native"}}) == "");
    CHECK(mode_of(*node) == (O_RDWR | O_DIRECT));
    CHECK(node->limits().request_alignment >= 512);
    CHECK(f.run(write_text(node, 1001, "unaligned")) == "");
    CHECK_THAT(reopen({{"aio", "native"}}), StartsWith("aio=native was specified"));
    CHECK(mode_of(*node) == (O_RDWR | O_DIRECT));
    CHECK_THAT(reopen({{"filename", path + "x"}}), StartsWith("Cannot change the option 'filename'"));
    CHECK_THAT(reopen({{"locking", "off"}}), StartsWith("Cannot change the option 'locking'"));
    REQUIRE(::truncate(path.c_str(), 2 * kMiB) == 0);
    CHECK(node->size() == kMiB);
    CHECK(reopen({}) == "");
    CHECK(mode_of(*node) == O_RDWR);
    CHECK(node->limits().request_alignment == 1);
    CHECK(node->size() == 2 * kMiB);
    CHECK((f.read(node, 0, kMiB) == data.substr(0, 1001) + "unaligned" + data.substr(1010)));
    f.detach(std::move(root));
    CHECK(reopen({{"read-only", true}}) == "");
    CHECK(mode_of(*node) == O_RDONLY);
    CHECK(node->read_only());
    CHECK(reopen({}) == "");
    CHECK(mode_of(*node) == O_RDWR);
}

TEST_CASE("file: the write queue writes everything in order from several loops", "[file]") {
    TempDir dir;
    TestRuntime rt;
    const std::string path = dir.file("img");
    const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    constexpr unsigned kWrites = 200;
    constexpr auto one = [](FileWriteQueue* queue, int fd, unsigned i, unsigned* failed) -> Task<void> {
        const std::string text = pattern(1000, i);
        const iovec iov{const_cast<char*>(text.data()), text.size()};
        const int r = co_await queue->write(fd, IoVec(iov), i * 1000ul);
        if (r != 0) ++*failed;
    };
    constexpr auto many = [](decltype(one) body, FileWriteQueue* queue, int fd, unsigned from) -> Task<unsigned> {
        TaskScope scope;
        unsigned failed = 0;
        for (unsigned i = 0; i < kWrites; ++i) scope.spawn(body(queue, fd, from + i, &failed));
        co_await scope.join();
        co_return failed;
    };
    constexpr auto all = [](TestRuntime* rt, decltype(many) body, decltype(one) step, int fd) -> Task<unsigned> {
        constexpr auto part = [](TestRuntime* rt, decltype(many) body, decltype(one) step, FileWriteQueue* queue,
                                 int fd, unsigned loop, unsigned* failed) -> Task<void> {
            *failed += co_await run_on(rt->io_loop(loop), body(step, queue, fd, loop * kWrites));
        };
        unsigned failed = 0;
        // Ends right after its last answer: the worker must not look at it any more.
        auto queue = std::make_unique<FileWriteQueue>();
        TaskScope scope;
        for (unsigned i = 0; i < rt->io_loop_count(); ++i)
            scope.spawn(part(rt, body, step, queue.get(), fd, i, &failed));
        co_await scope.join();
        queue.reset();
        co_return failed;
    };
    CHECK(rt.run(all(&rt, many, one, fd.get())) == 0);
    const std::string back = file_bytes(path);
    REQUIRE(back.size() == rt.io_loop_count() * kWrites * 1000);
    for (unsigned i = 0; i < rt.io_loop_count() * kWrites; ++i) {
        if (back.compare(i * 1000, 1000, pattern(1000, i)) != 0) FAIL("write " << i << " is not where it belongs");
    }
}

TEST_CASE("file: the alignment of O_DIRECT is found by reading where nobody tells it", "[file]") {
    const auto probe = [](uint32_t request, uint32_t memory, bool cached) {
        return probe_alignment([=](long offset, uint32_t length, uint32_t at) {
            if (cached) return static_cast<int>(length);
            return offset % request || length % request || at % memory ? -EINVAL : static_cast<int>(length);
        });
    };
    CHECK(probe(512, 512, false).request == 512);
    CHECK(probe(512, 512, false).memory == 512);
    CHECK(probe(4096, 512, false).request == 4096);
    CHECK(probe(4096, 512, false).memory == 512);
    CHECK(probe(4096, 4096, false).memory == 4096);
    CHECK(probe(1, 1, true).request == 4096);
    CHECK(probe(1, 1, true).memory == 4096);
}
