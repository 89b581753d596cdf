// Random operations on stacks of raw nodes over disks with awkward limits, against a plain array.

#include <catch2/catch.hpp>

#include <random>

#include "runtime/cross_loop.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;

namespace {

constexpr uint64_t kMaxSize = 256 * 1024;

struct Stack {
    const char* name;
    const char* disk;   // options of the memory node
    const char* lower;  // options of the raw node on it
    const char* upper;  // and of the one above
    bool resizable;
};

constexpr Stack kStacks[] = {
    {"no limits", "", "", "", true},
    {"sectors", ",'request-alignment':512,'memory-alignment':512", "", "", true},
    {"pages, small transfers", ",'request-alignment':4096,'memory-alignment':4096,'max-transfer':8192", "", "", true},
    {"a window out of step", ",'request-alignment':4096,'zeroes-alignment':4096", ",'offset':1000", "", true},
    {"a window in a window", ",'request-alignment':512,'discard-alignment':4096", ",'offset':4096,'size':200001",
     ",'offset':513,'size':150000", false},
    {"no zeroes, no inline", ",'no-zeroes':true,'no-inline':true,'request-alignment':512", "",
     ",'detect-zeroes':'unmap'", true},
};

class Model {
  public:
    Model(GraphFixture& f, bool resizable, unsigned seed) : f_(f), resizable_(resizable), random_(seed) {}

    /// `rounds` operations from the loop of the channel; resizes go through the graph.
    void run(unsigned rounds) {
        RootOptions options = GraphFixture::writer();
        options.perms.share = Perm::kAll;
        auto root = f_.attach("top", options);
        Channel* channel = f_.run(root->channel(f_.runtime.io_loop()));
        model_.assign(f_.node("top").size(), 0);
        for (unsigned round = 0; round < rounds && failure_.empty(); ++round) {
            if (resizable_) resize();
            f_.runtime.run_on_io(burst(this, channel));
        }
        CHECK(failure_ == "");
        f_.detach(std::move(root));
    }

  private:
    uint64_t pick(uint64_t n) { return n == 0 ? 0 : random_() % n; }
    /// Often at the edges of alignment units and of the disk.
    uint64_t pick_offset() {
        const uint64_t at = pick(model_.size() + 1);
        switch (pick(4)) {
            case 0:
                return at & ~uint64_t{4095};
            case 1:
                return at & ~uint64_t{511};
            case 2:
                return at;
            default:
                return model_.size() - std::min<uint64_t>(model_.size(), pick(6000));
        }
    }
    uint64_t pick_length(uint64_t offset) {
        const uint64_t limit = std::min<uint64_t>(model_.size() - offset, pick(8) == 0 ? 60000 : 9000);
        uint64_t length = pick(limit + 1);
        if (pick(3) == 0) length &= ~uint64_t{511};
        return length;
    }

    void resize() {
        const uint64_t size = pick(kMaxSize + 1);
        Result<> done = f_.run(f_.graph->resize(f_.node("top"), static_cast<int64_t>(size)));
        if (!done) failure_ = done.error().message();
        model_.resize(size, 0);
        if (f_.node("top").size() != size)
            failure_ = fmt::format("size {} after a resize to {}", f_.node("top").size(), size);
    }

    static Task<void> burst(Model* m, Channel* channel) {
        for (int i = 0; i < 200 && m->failure_.empty(); ++i) co_await m->one(*channel);
    }

    Task<void> one(Channel& channel) {
        const uint64_t offset = pick_offset();
        const uint64_t length = pick_length(offset);
        const unsigned what = static_cast<unsigned>(pick(10));
        // Unaligned memory in two pieces: the request layer has to cope.
        std::vector<uint8_t> memory(length + 2);
        const uint64_t cut = pick(length + 1);
        const iovec parts[2] = {{memory.data() + 1, cut}, {memory.data() + 1 + cut, length - cut}};
        const IoVec iov(parts, 2, length);
        uint8_t* data = memory.data() + 1;
        Result<> done;
        if (what < 4) {
            const bool zero = pick(4) == 0;
            for (uint64_t i = 0; i < length; ++i) data[i] = zero ? 0 : static_cast<uint8_t>(random_());
            int tried = pick(2) ? channel.try_write(offset, iov, WriteFlags::kNone) : -EAGAIN;
            if (tried == -EAGAIN) {
                done = co_await channel.write(offset, iov, pick(4) == 0 ? WriteFlags::kFua : WriteFlags::kNone);
            } else if (tried != 0) {
                failure_ = fmt::format("try_write: {}", tried);
            }
            std::copy_n(data, length, model_.begin() + static_cast<ptrdiff_t>(offset));
        } else if (what == 4) {
            done = co_await channel.write_zeroes(offset, length, pick(2) ? WriteFlags::kMayUnmap : WriteFlags::kNone);
            std::fill_n(model_.begin() + static_cast<ptrdiff_t>(offset), length, 0);
        } else if (what == 5) {
            done = co_await channel.discard(offset, length);
            if (done) done = co_await channel.read(offset, iov);
            for (uint64_t i = 0; i < length && failure_.empty(); ++i) {
                uint8_t& was = model_[offset + i];
                if (data[i] != was && data[i] != 0) failure_ = fmt::format("byte {} after a discard", offset + i);
                was = data[i];
            }
        } else if (what == 6) {
            done = co_await channel.flush();
        } else {
            int tried = pick(2) ? channel.try_read(offset, iov) : -EAGAIN;
            if (tried == -EAGAIN) {
                done = co_await channel.read(offset, iov);
            } else if (tried != 0) {
                failure_ = fmt::format("try_read: {}", tried);
            }
            if (!std::equal(data, data + length, model_.begin() + static_cast<ptrdiff_t>(offset)))
                failure_ = fmt::format("{} bytes at {} are not what was written", length, offset);
        }
        if (!done) failure_ = done.error().message();
    }

    GraphFixture& f_;
    const bool resizable_;
    std::mt19937 random_;
    std::vector<uint8_t> model_;
    std::string failure_;
};

}  // namespace

TEST_CASE("raw: random operations match a plain array on every kind of disk", "[block][raw][model]") {
    const Stack& stack = GENERATE(from_range(std::begin(kStacks), std::end(kStacks)));
    CAPTURE(stack.name);
    GraphFixture f;
    auto definition = [](std::string_view driver, std::string_view name, std::string_view rest) {
        return fmt::format("{{'driver':'{}','node-name':'{}','discard':'unmap'{}}}", driver, name, rest);
    };
    REQUIRE(f.add(definition("memory", "disk", fmt::format(",'size':{}{}", kMaxSize, stack.disk))) == "");
    REQUIRE(f.add(definition("raw", "mid", fmt::format(",'file':'disk'{}", stack.lower))) == "");
    REQUIRE(f.add(definition("raw", "top", fmt::format(",'file':'mid'{}", stack.upper))) == "");
    const char* rounds = std::getenv("GANTRY_TEST_MODEL_ROUNDS");
    Model(f, stack.resizable, 20260101).run(rounds ? static_cast<unsigned>(std::atoi(rounds)) : 25);
}
