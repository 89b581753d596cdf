#include "block/protocols/file_locks.h"

#include <fcntl.h>

#include <catch2/catch.hpp>

#include "tests/unit/block/child_process.h"
#include "tests/unit/block/file_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

UniqueFd open_at(const std::string& path) { return UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)); }

std::string message_of(const Result<>& r) { return r ? std::string() : r.error().message(); }

Task<bool> locked_by_other(int fd, FileLockSet wanted) {
    co_return co_await wait_until([=] { return !file_lock_check(fd, wanted, "x"); });
}

}  // namespace

TEST_CASE("file locks: two descriptions of one process protect each other", "[file][locks]") {
    TempDir dir;
    const UniqueFd a = open_at(dir.file("i")), b = open_at(dir.file("i"));
    const FileLockSet writer{Perm::kConsistentRead | Perm::kWrite, Perm::kWrite};
    const FileLockSet reader{Perm::kConsistentRead, Perm::kNone};
    REQUIRE(file_locks_supported(a.get()));
    REQUIRE(file_lock_more(a.get(), {}, writer, "i"));
    REQUIRE(file_lock_check(a.get(), writer, "i"));

    // Shared locks never collide when they are taken; the check finds them.
    REQUIRE(file_lock_more(b.get(), {}, writer, "i"));
    auto r = file_lock_check(b.get(), {Perm::kWrite, Perm::kNone}, "i");
    REQUIRE_FALSE(r);
    CHECK(r.error().kind() == ErrorKind::kPermission);
    CHECK_THAT(r.error().message(),
               Catch::StartsWith("Failed to get \"write\" lock; Is another process using the image [i]?"));
    CHECK_THAT(r.error().message(), Catch::Contains("This process has it open already"));
    r = file_lock_check(b.get(), {Perm::kNone, Perm::kWrite}, "i");
    REQUIRE_FALSE(r);
    CHECK_THAT(r.error().message(), Catch::StartsWith("Failed to get shared \"write\" lock; Is another process"));
    CHECK(file_lock_check(b.get(), reader, "i"));

    // What is kept stays locked, the rest is free again.
    file_unlock(a.get(), writer, reader);
    CHECK(file_lock_check(b.get(), writer, "i"));
    CHECK_THAT(message_of(file_lock_check(b.get(), {Perm::kNone, Perm::kConsistentRead}, "i")),
               Catch::StartsWith("Failed to get shared \"consistent read\" lock"));
}

TEST_CASE("file locks: a byte that somebody locked exclusively is refused and nothing stays locked", "[file][locks]") {
    TempDir dir;
    const UniqueFd a = open_at(dir.file("i")), b = open_at(dir.file("i")), c = open_at(dir.file("i"));
    struct flock fl{};
    fl.l_type = F_WRLCK;
    fl.l_whence = SEEK_SET;
    fl.l_start = 201;
    fl.l_len = 1;
    REQUIRE(::fcntl(a.get(), F_OFD_SETLK, &fl) == 0);
    auto r = file_lock_more(b.get(), {}, {Perm::kConsistentRead, Perm::kWrite}, "i");
    REQUIRE_FALSE(r);
    CHECK(r.error().kind() == ErrorKind::kPermission);
    CHECK_THAT(r.error().message(), Catch::StartsWith("Failed to lock byte 201; Is another process"));
    CHECK(file_lock_check(c.get(), {Perm::kNone, Perm::kConsistentRead}, "i"));
}

TEST_CASE("file locks: an image that qemu writes is refused, with the name of the holder", "[file][locks][interop]") {
    if (!have_program("qemu-io")) {
        WARN("skipped: qemu-io is not installed");
        return;
    }
    FileFixture f;
    const std::string path = f.dir.file("disk.raw");
    write_file(path, std::string(1 << 20, 'a'));
    {
        ChildProcess holder({"qemu-io", "-f", "raw", path});
        const UniqueFd probe = open_at(path);
        REQUIRE(f.rt.run(locked_by_other(probe.get(), {Perm::kNone, Perm::kWrite})));

        auto node = f.add_file(path);
        REQUIRE(node);
        auto root = f.attach(**node, FileFixture::kWriter, ~(Perm::kWrite | Perm::kResize));
        REQUIRE_FALSE(root);
        CHECK(root.error().kind() == ErrorKind::kPermission);
        CHECK_THAT(root.error().message(),
                   Catch::StartsWith("Failed to get shared \"write\" lock; Is another process using the image ["));
        CHECK_THAT(root.error().message(), Catch::Contains(fmt::format("process {} (qemu-io)", holder.pid())));
        // Who shares writing may read beside the writer.
        auto reader = f.attach(**node, FileFixture::kReader);
        CHECK(reader);
        if (reader) f.detach(std::move(*reader));
        // After a refusal none of our locks is left for others to run into.
        CHECK(file_lock_check(probe.get(), {Perm::kNone, Perm::kConsistentRead | Perm::kResize}, "i").has_value() ==
              false);
        CHECK(file_lock_check(probe.get(), {Perm::kNone, Perm::kResize}, "i"));
        CHECK(holder.wait() == 0);
        auto now = f.attach(**node, FileFixture::kWriter, ~(Perm::kWrite | Perm::kResize));
        REQUIRE(now);
        f.detach(std::move(*now));
    }
    {
        // A qcow2 image under a running daemon lets nobody write.
        if (!have_program("qemu-storage-daemon") || !have_program("qemu-img")) {
            WARN("skipped in part: qemu-storage-daemon is not installed");
            return;
        }
        const std::string image = f.dir.file("a.qcow2");
        REQUIRE(run_program({"qemu-img", "create", "-q", "-f", "qcow2", image, "1M"}).status == 0);
        ChildProcess daemon(
            {"qemu-storage-daemon", "--blockdev", "driver=qcow2,node-name=q,file.driver=file,file.filename=" + image});
        const UniqueFd probe = open_at(image);
        REQUIRE(f.rt.run(locked_by_other(probe.get(), {Perm::kWrite, Perm::kNone})));
        const std::string before = file_bytes(image);
        auto node = f.add({{"driver", "file"}, {"node-name", "g"}, {"filename", image}});
        REQUIRE(node);
        auto root = f.attach(**node, FileFixture::kWriter);
        REQUIRE_FALSE(root);
        CHECK_THAT(root.error().message(), Catch::StartsWith("Failed to get \"write\" lock; Is another process"));
        CHECK_THAT(root.error().message(), Catch::Contains("(qemu-storage-d"));
        CHECK(file_bytes(image) == before);
    }
}

TEST_CASE("file locks: qemu keeps away from an image that we write", "[file][locks][interop]") {
    if (!have_program("qemu-io") || !have_program("qemu-img")) {
        WARN("skipped: qemu-io and qemu-img are not installed");
        return;
    }
    FileFixture f;
    const std::string path = f.dir.file("disk.raw");
    write_file(path, std::string(1 << 20, 'a'));
    auto node = f.add_file(path, {{"auto-read-only", true}});
    REQUIRE(node);
    const std::vector<std::string> write = {"qemu-io", "-f", "raw", "-c", "write -P 0x62 0 512", path};
    const std::vector<std::string> read = {"qemu-io", "-f", "raw", "-r", "-c", "read 0 512", path};

    SECTION("without a user the file is free") {
        CHECK(run_program(write).status == 0);
        CHECK(f.read(*node, 0, 1) == "b");
    }
    SECTION("a writer that shares nothing keeps writers and formats away") {
        auto root = f.attach(**node, FileFixture::kWriter, Perm::kConsistentRead);
        REQUIRE(root);
        const Ran ran = run_program(write);
        CHECK(ran.status != 0);
        CHECK_THAT(ran.output, Catch::Contains("Failed to get \"write\" lock"));
        CHECK(file_bytes(path)[0] == 'a');
        // Who does not ask is let in.
        CHECK(run_program({"qemu-img", "info", "-U", "-f", "raw", path}).status == 0);
        f.detach(std::move(*root));
        CHECK(run_program(write).status == 0);
    }
    SECTION("a writer that shares writing keeps those away who do not") {
        auto root = f.attach(**node, FileFixture::kWriter, Perm::kAll);
        REQUIRE(root);
        CHECK(run_program(write).status == 0);
        CHECK(run_program(read).status == 0);
        const Ran ran = run_program({"qemu-img", "convert", "-f", "raw", "-O", "raw", path, f.dir.file("copy")});
        CHECK(ran.status != 0);
        CHECK_THAT(ran.output, Catch::Contains("Failed to get shared \"write\" lock"));
        f.detach(std::move(*root));
    }
    SECTION("force-share and locking=off take none") {
        f.remove();
        const std::string option = GENERATE("force-share", "locking");
        json::object more = option == "locking" ? json::object{{"locking", "off"}}
                                                : json::object{{"force-share", true}, {"read-only", true}};
        node = f.add_file(path, std::move(more));
        REQUIRE(node);
        auto root = f.attach(**node, FileFixture::kReader, Perm::kConsistentRead);
        REQUIRE(root);
        CHECK(run_program(write).status == 0);
        f.detach(std::move(*root));
    }
}

TEST_CASE("file locks: of two nodes on one file the second writer is refused", "[file][locks]") {
    FileFixture f;
    const std::string path = f.dir.file("disk.raw");
    write_file(path, std::string(4096, 'a'));
    auto a = f.add_file(path);
    auto b = f.add({{"driver", "file"}, {"node-name", "g"}, {"filename", path}});
    REQUIRE((a && b));
    auto first = f.attach(**a, FileFixture::kWriter, Perm::kConsistentRead);
    REQUIRE(first);
    auto second = f.attach(**b, FileFixture::kWriter, Perm::kConsistentRead);
    REQUIRE_FALSE(second);
    CHECK_THAT(second.error().message(), Catch::StartsWith("Failed to get \"write\" lock"));
    f.detach(std::move(*first));
    second = f.attach(**b, FileFixture::kWriter, Perm::kConsistentRead);
    CHECK(second);
    if (second) f.detach(std::move(*second));
}
