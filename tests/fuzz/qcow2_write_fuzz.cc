// Repairs and writes any bytes as a qcow2 image: nothing crashes or hangs; what a repair calls clean is clean; and an
// image in which a check finds nothing wrong keeps what is written to it, and stays without fault.

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <random>

#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/image_control.h"
#include "tests/fuzz/qcow2_environment.h"
#include "tests/support/node_io.h"

namespace {

using namespace gantry;
using block::CheckRepair;
using block::ImageCheck;
using block::WriteFlags;
using test::Bytes;
using test::Qcow2Environment;
using test::Qcow2Input;

constexpr uint64_t kWindowBytes = 24 * 1024;
constexpr unsigned kOperations = 24;

bool clean(const ImageCheck& c) { return c.corruptions == 0 && c.leaks == 0 && c.check_errors == 0; }

/// Nothing wrong but that COPIED is missing somewhere, which costs a copy. A repair leaves two entries that name the
/// same cluster as they are; when one of them is written elsewhere, the other keeps the cluster without the flag.
bool sound(const Result<ImageCheck>& check) {
    if (!check || check->check_errors != 0) return false;
    const auto harmless = [](const std::string& finding) {
        return finding.starts_with("Leaked cluster") ||
               (finding.starts_with("ERROR OFLAG_COPIED") && finding.ends_with("refcount=1"));
    };
    return check->corruptions == 0 ||
           (check->findings.size() < ImageCheck::kMaxFindings && std::ranges::all_of(check->findings, harmless));
}

/// A part of the disk whose contents are known.
struct Window {
    uint64_t offset = 0;
    Bytes bytes;
};

/// What must be there, as far as it can be told.
struct Model {
    std::vector<Window> windows;
    bool known = true;  // false: the image was damaged before, so anything may be found
};

Task<void> learn(block::Node& node, Model& model) {
    const uint64_t size = node.size();
    for (unsigned i = 0; i < 4; i++) {
        const uint64_t at = i == 3 ? (size > kWindowBytes ? size - kWindowBytes : 0) : size / 3 * i;
        if (!model.windows.empty() && at < model.windows.back().offset + model.windows.back().bytes.size()) continue;
        const uint64_t length = std::min(kWindowBytes, size - at);
        if (length == 0) break;
        auto bytes = co_await test::node_read(&node, at, length);
        if (bytes) model.windows.push_back({at, std::move(*bytes)});
    }
}

/// One sequence of requests and operations on an open image.
class Session {
  public:
    Session(block::Graph& graph, block::Node& node, Model& model, uint64_t seed)
        : graph_(graph), node_(node), model_(model), random_(seed) {}

    Task<void> work() {
        for (unsigned i = 0; i < kOperations; i++) co_await step();
        co_await compare();
    }

  private:
    uint64_t upto(uint64_t n) { return std::uniform_int_distribution<uint64_t>(0, n - 1)(random_); }

    bool broken() { return node_.closed() || model_.windows.empty(); }

    Task<void> step() {
        if (broken()) co_return;
        Window& window = model_.windows[upto(model_.windows.size())];
        const uint64_t at = upto(window.bytes.size());
        const uint64_t length = upto(std::min<uint64_t>(window.bytes.size() - at, 8192)) + 1;
        const uint64_t kind = upto(100);
        test::trace("operation {} at {:#x} + {:#x}, {:#x} bytes", kind, window.offset, at, length);
        if (kind < 40) co_return co_await write(window, at, length, WriteFlags::kNone);
        if (kind < 48) co_return co_await write_compressed(window);
        if (kind < 60)
            co_return co_await zero(window, at, length, kind < 54 ? WriteFlags::kMayUnmap : WriteFlags::kNone);
        if (kind < 70) co_return co_await discard(window, at, length);
        if (kind < 78) co_return settle(co_await test::node_flush(&node_));
        if (kind < 84) co_return co_await snapshot();
        if (kind < 88) co_return co_await apply();
        if (kind < 91) co_return co_await remove();
        if (kind < 94) co_return co_await resize();
        if (kind < 96) co_return co_await check();
        if (kind < 97) co_return settle(co_await block::compact_image(graph_, node_));
        if (kind < 99) co_return co_await amend();
        co_return co_await compare();
    }

    /// In a sound image nothing fails but what is refused for a reason that is not damage.
    void settle(const Result<>& result) {
        if (!result) test::trace("  {}", result.error().message());
        if (result || !model_.known) return;
        const ErrorKind kind = result.error().kind();
        if (kind == ErrorKind::kCorrupt || kind == ErrorKind::kIo) {
            std::fprintf(stderr, "a sound image says: %s\n", result.error().message().c_str());
            FUZZ_REQUIRE(false);
        }
    }
    void put(Window& window, uint64_t at, const Bytes& bytes) {
        std::ranges::copy(bytes, window.bytes.begin() + static_cast<ptrdiff_t>(at));
    }
    /// What a failed request has left is not known.
    void lose(const Window& window) {
        const uint64_t offset = window.offset;
        std::erase_if(model_.windows, [offset](const Window& w) { return w.offset == offset; });
    }

    Task<void> write(Window& window, uint64_t at, uint64_t length, WriteFlags flags) {
        Bytes bytes = test::pattern(length, static_cast<uint8_t>(upto(256)));
        auto done = co_await test::node_write(&node_, window.offset + at, bytes, flags);
        settle(done);
        if (!done) co_return lose(window);
        put(window, at, bytes);
    }
    Task<void> write_compressed(Window& window) {
        const uint64_t cs = node_.cluster_size();
        const uint64_t first = (window.offset + cs - 1) / cs * cs;
        if (cs == 0 || first + cs > window.offset + window.bytes.size()) co_return;
        Bytes bytes(cs, static_cast<uint8_t>(upto(256)));
        auto done = co_await test::node_write(&node_, first, bytes, WriteFlags::kCompressed);
        settle(done);
        if (done) {
            put(window, first - window.offset, bytes);
        } else if (done.error().kind() != ErrorKind::kUnsupported) {
            lose(window);
        }
    }
    Task<void> zero(Window& window, uint64_t at, uint64_t length, WriteFlags flags) {
        auto done = co_await test::node_zero(&node_, window.offset + at, length, flags);
        settle(done);
        if (!done) co_return lose(window);
        put(window, at, Bytes(length));
    }
    Task<void> discard(Window& window, uint64_t at, uint64_t length) {
        auto done = co_await test::node_discard(&node_, window.offset + at, length);
        settle(done);
        // Whole clusters are zeroes afterwards, other bytes as they were.
        auto now = co_await test::node_read(&node_, window.offset, window.bytes.size());
        if (!done || !now) {
            FUZZ_REQUIRE(now || !model_.known);
            co_return lose(window);
        }
        for (size_t i = 0; i < now->size() && model_.known; i++) {
            const bool inside = i >= at && i < at + length;
            FUZZ_REQUIRE((*now)[i] == window.bytes[i] || (inside && (*now)[i] == 0));
        }
        window.bytes = std::move(*now);
    }
    Task<void> snapshot() {
        auto done = co_await block::create_snapshot(graph_, node_, {.name = fmt::format("s{}", ++snapshots_)});
        settle(done);
        if (done) states_[fmt::format("s{}", snapshots_)] = model_.windows;
    }
    Task<void> apply() {
        if (states_.empty()) co_return;
        auto it = std::next(states_.begin(), static_cast<ptrdiff_t>(upto(states_.size())));
        auto done = co_await block::apply_snapshot(graph_, node_, it->first);
        settle(done);
        model_.windows = it->second;
        if (!done) model_.windows.clear();
    }
    Task<void> remove() {
        if (states_.empty()) co_return;
        const std::string name = states_.begin()->first;
        auto done = co_await block::delete_snapshot(graph_, node_, "", name);
        settle(done);
        if (done) states_.erase(name);
    }
    Task<void> resize() {
        const uint64_t size = node_.size();
        uint64_t wanted = upto(2) ? size + upto(64 * 1024) : size - upto(std::min<uint64_t>(size, 64 * 1024) + 1);
        wanted &= ~uint64_t{511};
        auto done = co_await block::resize_image(graph_, node_, wanted, block::Preallocation::kOff, true);
        settle(done);
        if (!done) co_return;
        std::erase_if(model_.windows, [&](const Window& w) { return w.offset >= node_.size(); });
        for (Window& w : model_.windows) w.bytes.resize(std::min<uint64_t>(w.bytes.size(), node_.size() - w.offset));
    }
    Task<void> check() {
        auto checked = co_await block::check_image(graph_, node_, CheckRepair::kNone);
        test::trace_check("check", checked);
        FUZZ_REQUIRE(!model_.known || sound(checked));
    }
    Task<void> amend() {
        const std::array<json::object, 4> wishes{json::object{{"compat", "0.10"}}, json::object{{"compat", "1.1"}},
                                                 json::object{{"refcount_bits", int64_t{1} << upto(7)}},
                                                 json::object{{"lazy_refcounts", upto(2) == 1}}};
        json::object options = wishes[upto(4)];
        options["driver"] = "qcow2";
        settle(co_await block::amend_image(graph_, node_, std::move(options), false));
    }
    Task<void> compare() {
        for (const Window& window : model_.windows) {
            auto now = co_await test::node_read(&node_, window.offset, window.bytes.size());
            if (model_.known) FUZZ_REQUIRE(now && *now == window.bytes);
        }
    }

    block::Graph& graph_;
    block::Node& node_;
    Model& model_;
    std::mt19937_64 random_;
    unsigned snapshots_ = 0;
    std::map<std::string, std::vector<Window>> states_;
};

/// The node below, so that a file can be checked that does not open.
Task<Result<ImageCheck>> check_bytes(block::Graph& graph, json::object file, CheckRepair repair) {
    file["node-name"] = "f";
    auto added = co_await graph.add(std::move(file));
    FUZZ_REQUIRE(added);
    auto root = co_await test::use_node(graph, **added, block::Perm::kConsistentRead | block::Perm::kWrite);
    auto checked = co_await block::qcow2::check_file(**added, "f", repair, {});
    test::trace_check(fmt::format("check with repair {}", static_cast<int>(repair)), checked);
    co_await graph.detach(std::move(root));
    auto removed = co_await graph.remove("f");
    FUZZ_REQUIRE(removed);
    co_return checked;
}

/// Opens for writing, works, closes. `known`: a check has found it sound. False: it was not opened.
Task<bool> open_and_write(block::Graph& graph, json::object options, bool known, uint64_t seed) {
    auto added = co_await graph.add(std::move(options));
    if (!added) co_return false;
    auto root = co_await test::use_node(graph, **added, block::Perm::kConsistentRead | block::Perm::kWrite);
    Model model;
    model.known = known;
    co_await learn(root->node(), model);
    Session session(graph, root->node(), model, seed);
    co_await session.work();
    co_await graph.detach(std::move(root));
    auto removed = co_await graph.remove("q");
    FUZZ_REQUIRE(removed);
    co_return true;
}

uint64_t seed_of(const uint8_t* data, size_t size) {
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = size > 64 ? size - 64 : 0; i < size; i++) hash = (hash ^ data[i]) * 0x100000001b3;
    return hash;
}

void repair_then_write(Qcow2Environment& e, const uint8_t* data, size_t size) {
    Qcow2Input input(e, data, size);
    const auto check = [&](CheckRepair repair) { return e.run(check_bytes(*input.graph, input.memory(), repair)); };
    const Result<ImageCheck> before = check(CheckRepair::kNone);
    FUZZ_REQUIRE(input.holds(data, size));
    if (!before) return;
    const Result<ImageCheck> leaks = check(CheckRepair::kLeaks);
    FUZZ_REQUIRE(!leaks || leaks->leaks <= before->leaks);
    const Result<ImageCheck> all = check(CheckRepair::kAll);
    if (!all) return;
    const Result<ImageCheck> after = check(CheckRepair::kNone);
    FUZZ_REQUIRE(after);
    FUZZ_REQUIRE(after->corruptions == all->corruptions && after->leaks == all->leaks);
    FUZZ_REQUIRE(all->corruptions != 0 || all->check_errors != 0 || clean(*after));
    const bool mended = sound(after);
    if (!e.run(open_and_write(*input.graph, input.image(), mended, seed_of(data, size)))) return;
    const Result<ImageCheck> closed = check(CheckRepair::kNone);
    FUZZ_REQUIRE(!mended || (sound(closed) && closed->leaks == 0));
}

void write_as_it_is(Qcow2Environment& e, const uint8_t* data, size_t size) {
    Qcow2Input input(e, data, size);
    const auto check = [&] { return e.run(check_bytes(*input.graph, input.memory(), CheckRepair::kNone)); };
    const bool undamaged = sound(check());
    if (!e.run(open_and_write(*input.graph, input.image(), undamaged, seed_of(data, size) + 1))) return;
    FUZZ_REQUIRE(!undamaged || sound(check()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Qcow2Environment* const environment = new Qcow2Environment;
    if (size > (uint64_t{1} << 24)) return 0;
    repair_then_write(*environment, data, size);
    write_as_it_is(*environment, data, size);
    return 0;
}
