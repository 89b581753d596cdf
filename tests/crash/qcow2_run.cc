#include "tests/crash/qcow2_run.h"

#include <fmt/ranges.h>

#include <fstream>
#include <iterator>
#include <sstream>

#include "block/bitmap.h"
#include "block/crypto/secrets.h"
#include "block/image_control.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"

namespace gantry::test {

using block::WriteFlags;

namespace {

constexpr uint64_t kSector = GuestModel::kSector;

void require(const Result<>& result, const char* what) {
    if (!result) throw std::runtime_error(std::string(what) + ": " + result.error().message());
}

std::vector<uint8_t> bytes_of(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void put(const std::string& path, const std::vector<uint8_t>& bytes) {
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

const char* loss_name(JournalDisk::Loss loss) {
    switch (loss) {
        case JournalDisk::Loss::kNothing:
            return "crash";
        case JournalDisk::Loss::kAll:
            return "everything volatile lost";
        case JournalDisk::Loss::kRandom:
            return "requests lost";
        case JournalDisk::Loss::kTorn:
            return "sectors lost";
    }
    return "";
}

}  // namespace

Qcow2Run::Qcow2Run(CrashConfig config, uint64_t seed)
    : GraphFixture(nullptr, {block::kQcow2Driver, kJournalDriver}), config_(std::move(config)), random_(seed) {
    const std::string path = dir_.file("image.qcow2");
    if (!config_.secret.empty()) {
        require(run(graph->secrets().add({{"qom-type", "secret"}, {"id", "s0"}, {"data", config_.secret}})), "secret");
    }
    std::string create = "qemu-img create -q -f qcow2 ";
    if (!config_.secret.empty()) create += secret_option() + " ";
    std::string options = config_.create;
    if (config_.data_file) options += (options.empty() ? "" : ",") + ("data_file=" + dir_.file("data"));
    if (!options.empty()) create += "-o " + options + " ";
    create += path + " " + std::to_string(config_.bytes);
    if (config_.bitmap) create += " && qemu-img bitmap --add -g 4k " + path + " marks";
    if (const ShellResult made = shell(create); made.status != 0) throw std::runtime_error(create + made.output);
    image_ = std::make_shared<JournalDisk>(clock_, bytes_of(path));
    JournalDisk::publish("image", image_);
    if (config_.data_file) {
        data_ = std::make_shared<JournalDisk>(clock_, bytes_of(dir_.file("data")));
        JournalDisk::publish("data", data_);
    }
    std::vector<bool> initial(config_.bytes / kSector);
    if (config_.backing) {
        std::vector<uint8_t> base(config_.bytes);
        for (uint64_t s = 0; s < initial.size(); s++) {
            initial[s] = (s / 24) % 2 == 0;
            GuestModel::fill(base.data() + s * kSector, s, initial[s] ? 1 : 0);
        }
        JournalDisk::publish("base", std::make_shared<JournalDisk>(clock_, std::move(base)));
    }
    guest_ = std::make_unique<GuestModel>(initial.size(), initial);
}

Qcow2Run::~Qcow2Run() {
    for (const char* name : {"image", "data", "base", "cut", "cut-data"}) JournalDisk::forget(name);
}

std::string Qcow2Run::secret_option() const { return "--object 'secret,id=s0,data=" + config_.secret + "'"; }

std::string Qcow2Run::definition(std::string_view node, std::string_view image, std::string_view data,
                                 std::string_view more) const {
    std::string text = "{'driver': 'qcow2', 'node-name': '" + std::string(node) + "', " + std::string(more) +
                       "'file': {'driver': 'journal', 'disk': '" + std::string(image) + "'}";
    if (config_.data_file) text += ", 'data-file': {'driver': 'journal', 'disk': '" + std::string(data) + "'}";
    text +=
        config_.backing ? ", 'backing': {'driver': 'journal', 'disk': 'base', 'read-only': true}" : ", 'backing': null";
    if (!config_.secret.empty()) text += ", 'encrypt': {'format': 'luks', 'key-secret': 's0'}";
    return text + "}";
}

// ---- The workload ----

Qcow2Run::Range Qcow2Run::pick() {
    const uint64_t total = guest_->sectors();
    for (int attempt = 0; attempt < 20; attempt++) {
        Range r{random_() % total, 1 + random_() % 40};
        if (random_() % 4 == 0) {  // whole clusters
            r.first = r.first / cluster_sectors_ * cluster_sectors_;
            r.count = cluster_sectors_ * (1 + random_() % 3);
        }
        if (random_() % 2 == 0) r.first %= std::max<uint64_t>(total / 4, 1);  // a part that is written often
        r.count = std::min(r.count, total - r.first);
        bool free = true;
        for (const Range& b : busy_) free = free && (r.first + r.count <= b.first || b.first + b.count <= r.first);
        if (free) return r;
    }
    return {0, 0};
}

Task<void> Qcow2Run::guest_operation(block::Node* node, Range range, unsigned kind) {
    const uint64_t offset = range.first * kSector, bytes = range.count * kSector;
    const Stamp begun = clock_.next();
    Result<> done;
    if (kind < 6) {  // write
        Bytes data(bytes);
        for (uint64_t s = range.first; s < range.first + range.count; s++) {
            const uint32_t version = guest_->new_version();
            guest_->begin(s, version, begun);
            GuestModel::fill(data.data() + (s - range.first) * kSector, s, version);
        }
        const WriteFlags flags = config_.compressed && kind < 3 ? WriteFlags::kCompressed : WriteFlags::kNone;
        done = co_await node_write(node, offset, std::move(data), flags);
    } else if (kind < 8) {
        for (uint64_t s = range.first; s < range.first + range.count; s++) guest_->begin(s, 0, begun);
        done = co_await node_zero(node, offset, bytes, kind == 6 ? WriteFlags::kMayUnmap : WriteFlags::kNone);
    } else {
        for (uint64_t s = range.first; s < range.first + range.count; s++) guest_->begin(s, 0, begun);
        done = co_await node_discard(node, offset, bytes);
        require(done, "discard");
        Result<Bytes> back = co_await node_read(node, offset, bytes);
        if (!back) throw std::runtime_error(back.error().message());
        const Stamp ended = clock_.next();
        for (uint64_t s = range.first; s < range.first + range.count; s++) {
            auto version = GuestModel::decode(back->data() + (s - range.first) * kSector, s);
            if (!version) throw std::runtime_error("garbage after a discard");
            guest_->settle(s, *version, ended);
        }
        co_return;
    }
    require(done, "a guest's request");
    const Stamp ended = clock_.next();
    for (uint64_t s = range.first; s < range.first + range.count; s++) guest_->end(s, ended);
}

Task<void> Qcow2Run::flush(block::Node* node) {
    const Stamp begun = clock_.next();
    const Result<> done = co_await node_flush(node);
    require(done, "flush");
    guest_->flushed(begun, clock_.next());
}

Task<void> Qcow2Run::verify_now(block::Node* node) {
    const uint64_t total = guest_->sectors();
    if (node->size() != total * kSector) throw std::runtime_error("the size is wrong");
    Result<Bytes> all = co_await node_read(node, 0, total * kSector);
    if (!all) throw std::runtime_error(all.error().message());
    for (uint64_t s = 0; s < total; s++) {
        auto version = GuestModel::decode(all->data() + s * kSector, s);
        if (!version || *version != guest_->current(s))
            throw std::runtime_error("live: sector " + std::to_string(s) + " holds " +
                                     (version ? std::to_string(*version) : "garbage") + ", not " +
                                     std::to_string(guest_->current(s)));
    }
}

Task<void> Qcow2Run::snapshot_step(block::Node* node) {
    std::vector<GuestModel::Snapshot*> live;
    for (auto& s : guest_->snapshots) {
        if (s.delete_begun == ~Stamp{0}) live.push_back(&s);
    }
    const unsigned what = live.empty() ? 0 : random_() % 4;
    if (what < 2 && live.size() < 4) {
        GuestModel::Snapshot s;
        s.name = "s" + std::to_string(++snapshot_count_);
        s.versions = guest_->versions();
        s.create_begun = clock_.next();
        guest_->snapshots.push_back(s);
        const Result<> done = co_await block::create_snapshot(*graph, *node, {.name = s.name});
        require(done, "snapshot create");
        guest_->snapshots.back().create_ended = clock_.next();
        operations_.emplace_back(s.create_begun, clock_.now());
        co_return;
    }
    if (live.empty()) co_return;
    GuestModel::Snapshot& s = *live[random_() % live.size()];
    if (what == 2) {
        const Stamp begun = clock_.next();
        for (uint64_t i = 0; i < guest_->sectors(); i++) guest_->begin(i, s.versions[i], begun);
        const Result<> done = co_await block::apply_snapshot(*graph, *node, s.name);
        require(done, "snapshot apply");
        const Stamp ended = clock_.next();
        for (uint64_t i = 0; i < guest_->sectors(); i++) guest_->end(i, ended);
        operations_.emplace_back(begun, ended);
        co_return;
    }
    s.delete_begun = clock_.next();
    const Result<> done = co_await block::delete_snapshot(*graph, *node, "", s.name);
    require(done, "snapshot delete");
    s.delete_ended = clock_.next();
    operations_.emplace_back(s.delete_begun, s.delete_ended);
}

Task<void> Qcow2Run::resize_step(block::Node* node) {
    const uint64_t total = guest_->sectors();
    const uint64_t limit = config_.bytes / kSector * 3;
    uint64_t to = 1 + random_() % limit;
    if (random_() % 2) to = std::min(limit, total + 1 + random_() % 3000);
    guest_->resize_begins(to, clock_.next());
    const Result<> done = co_await block::resize_image(*graph, *node, to * kSector, block::Preallocation::kOff, true);
    require(done, "resize");
    guest_->resize_ended(clock_.next());
}

Task<void> Qcow2Run::compact_step(block::Node* node) {
    const Result<> done = co_await block::compact_image(*graph, *node);
    require(done, "compact");
}

Task<void> Qcow2Run::amend_step(block::Node* node) {
    json::object options;
    if (random_() % 3 == 0) {
        options["lazy_refcounts"] = random_() % 2 ? "on" : "off";
    } else {
        options["refcount_bits"] = std::to_string(1u << (random_() % 7));
    }
    const Result<> done = co_await block::amend_image(*graph, *node, std::move(options), false);
    require(done, "amend");
}

Task<void> Qcow2Run::run_workload(block::Node* node) {
    cluster_sectors_ = std::max<uint64_t>(node->cluster_size() / kSector, 1);
    for (unsigned step = 0; step < config_.steps; step++) {
        {
            TaskScope scope;
            busy_.clear();
            const unsigned together = 1 + random_() % 6;
            for (unsigned i = 0; i < together; i++) {
                const Range range = pick();
                if (range.count == 0) continue;
                busy_.push_back(range);
                scope.spawn(guest_operation(node, range, random_() % 10));
            }
            if (random_() % 6 == 0) scope.spawn(flush(node));
            co_await scope.join();
        }
        if (random_() % 4 == 0) co_await flush(node);
        if (random_() % 8 == 0) co_await verify_now(node);
        if (config_.snapshots && random_() % 8 == 0) co_await snapshot_step(node);
        if (config_.resizes && random_() % 8 == 0) co_await resize_step(node);
        if (config_.compacts && random_() % 8 == 0) co_await compact_step(node);
        if (config_.amends && random_() % 8 == 0) co_await amend_step(node);
    }
    co_await verify_now(node);
}

void Qcow2Run::work() {
    if (auto refused = add(definition("q", "image", "data", config_.options + "'discard': 'unmap', "));
        !refused.empty())
        throw std::runtime_error(refused);
    block::RootOptions user = writer();
    user.perms.share = block::Perm::kAll;  // snapshots and resizes happen meanwhile
    auto root = attach("q", user);
    run(run_workload(&node("q")));
    detach(std::move(root));
    if (auto refused = remove("q"); !refused.empty()) throw std::runtime_error(refused);
}

// ---- The judgement ----

bool Qcow2Run::in_snapshot_operation(Stamp t) const {
    return std::ranges::any_of(operations_, [&](const auto& o) { return o.first <= t && t <= o.second; });
}

namespace {

/// Every line of a check's output that tells of a corruption is about a COPIED flag.
bool only_flags(const std::vector<std::string>& lines) {
    return std::ranges::all_of(lines, [](const std::string& line) {
        return !line.starts_with("ERROR") || line.starts_with("ERROR OFLAG_COPIED");
    });
}

}  // namespace

std::string Qcow2Run::qemu_check(const std::vector<uint8_t>& bytes, Allowed allowed) {
    const std::string path = dir_.file("cut.qcow2");
    put(path, bytes);
    std::string command = "qemu-img check ";
    if (!config_.secret.empty()) {
        command += secret_option() + " --image-opts driver=qcow2,file.filename=" + path +
                   ",encrypt.format=luks,encrypt.key-secret=s0";
    } else {
        command += path;
    }
    const ShellResult checked = shell(command);
    if (checked.status == 0 || (checked.status == 3 && allowed != Allowed::kNothing)) return {};
    std::istringstream in(checked.output);
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    if (checked.status == 2 && allowed == Allowed::kFlags && only_flags(lines)) return {};
    return fmt::format("qemu-img check says {}: {}", checked.status, fmt::join(lines, "; "));
}

std::string Qcow2Run::check_clean(const char* when, Allowed allowed) {
    auto checked = run(block::check_image(*graph, node("v"), block::CheckRepair::kNone));
    if (!checked) return std::string(when) + ": " + checked.error().message();
    if (checked->check_errors == 0) {
        if (checked->corruptions == 0 && (allowed != Allowed::kNothing || checked->leaks == 0)) return {};
        if (allowed == Allowed::kFlags && only_flags(checked->findings)) return {};
    }
    std::string text = fmt::format("{}: {} corruptions, {} leaks", when, checked->corruptions, checked->leaks);
    for (size_t i = 0; i < checked->findings.size() && i < 6; i++) text += "; " + checked->findings[i];
    return text;
}

std::string Qcow2Run::judge_contents(block::Node& v, Stamp t) {
    const uint64_t sectors = v.size() / kSector;
    if (!guest_->size_allowed(sectors, t)) return "the disk has " + std::to_string(sectors) + " sectors";
    auto all = run(node_read(&v, 0, sectors * kSector));
    if (!all) return all.error().message();
    for (uint64_t s = 0; s < sectors; s++) {
        std::string fault = guest_->judge(s, GuestModel::decode(all->data() + s * kSector, s), t);
        if (!fault.empty()) return fault;
    }
    return {};
}

std::string Qcow2Run::judge_bitmap(block::Node& v, Stamp t) {
    for (const auto& bitmap : v.bitmaps()) {
        if (bitmap->inconsistent) continue;
        for (uint64_t s = 0; s < v.size() / kSector; s++) {
            if (guest_->changed_before(s, t) && !bitmap->is_dirty(s * kSector))
                return "a bitmap that looks consistent lacks the change of sector " + std::to_string(s);
        }
    }
    return {};
}

std::string Qcow2Run::judge_snapshots(Stamp t) {
    for (const auto& s : guest_->snapshots) {
        const bool must_be = s.create_ended <= t && s.delete_begun > t;
        const bool must_not = s.create_begun > t || s.delete_ended <= t;
        const std::string refused =
            add(definition("v", "cut", "cut-data", "'read-only': true, 'snapshot': '" + s.name + "', "));
        if (!refused.empty()) {
            if (must_be) return "snapshot " + s.name + ": " + refused;
            continue;
        }
        std::string fault = must_not ? "snapshot " + s.name + " exists" : "";
        auto all = run(node_read(&node("v"), 0, s.versions.size() * kSector));
        if (!all) fault = all.error().message();
        for (uint64_t i = 0; fault.empty() && i < s.versions.size(); i++) {
            if (GuestModel::decode(all->data() + i * kSector, i) != s.versions[i])
                fault = "snapshot " + s.name + " is wrong at sector " + std::to_string(i);
        }
        remove("v");
        if (!fault.empty()) return fault;
    }
    return {};
}

std::string Qcow2Run::judge(Stamp t, JournalDisk::Loss loss) {
    StampClock clock;
    auto cut = std::make_shared<JournalDisk>(clock, image_->after_cut(t, loss, random_));
    JournalDisk::publish("cut", cut);
    if (data_) {
        JournalDisk::publish("cut-data", std::make_shared<JournalDisk>(clock, data_->after_cut(t, loss, random_)));
    }
    const bool ask_qemu = judged_++ % 16 == 0;
    const bool lazy = config_.amends || config_.options.find("lazy-refcounts") != std::string::npos ||
                      config_.create.find("lazy_refcounts=on") != std::string::npos;
    std::string fault;
    const Allowed as_found = in_snapshot_operation(t) ? Allowed::kFlags : Allowed::kLeaks;
    if (ask_qemu && !lazy) fault = qemu_check(cut->contents(), as_found);
    if (!fault.empty()) return fault;
    // As found, nothing changed.
    std::string refused = add(definition("v", "cut", "cut-data", "'read-only': true, "));
    if (!refused.empty()) return "read-only open: " + refused;
    if (!lazy) fault = check_clean("as found", as_found);
    if (fault.empty()) fault = judge_contents(node("v"), t);
    if (fault.empty()) fault = judge_bitmap(node("v"), t);
    remove("v");
    if (fault.empty() && config_.snapshots) fault = judge_snapshots(t);
    if (!fault.empty()) return fault;
    // As a program would go on with it.
    refused = add(definition("v", "cut", "cut-data", config_.options));
    if (!refused.empty()) return "writable open: " + refused;
    {
        auto root = attach("v", writer());
        fault = judge_contents(node("v"), t);
        if (fault.empty()) {
            Bytes data(kSector);
            GuestModel::fill(data.data(), 0, 1);
            const Result<> wrote = run(node_write(&node("v"), 0, data));
            if (!wrote) fault = "a write afterwards: " + wrote.error().message();
        }
        detach(std::move(root));
    }
    remove("v");
    if (!fault.empty()) return "after reopening: " + fault;
    refused = add(definition("v", "cut", "cut-data", "'read-only': true, "));
    if (!refused.empty()) return "open after closing: " + refused;
    fault = check_clean("after closing", Allowed::kNothing);
    remove("v");
    if (fault.empty() && ask_qemu) fault = qemu_check(cut->contents(), Allowed::kNothing);
    return fault;
}

std::string Qcow2Run::cut(unsigned cuts) {
    using Loss = JournalDisk::Loss;
    std::vector<Stamp> moments = image_->moments();
    std::ranges::shuffle(moments, random_);
    constexpr Loss kLosses[] = {Loss::kTorn, Loss::kRandom, Loss::kTorn, Loss::kAll, Loss::kNothing};
    for (unsigned i = 0; i < cuts && i < moments.size() * 4; i++) {
        const Stamp t = moments[i % moments.size()] - (random_() % 2);
        const Loss loss = kLosses[i % std::size(kLosses)];
        std::string fault = judge(t, loss);
        if (!fault.empty()) return fmt::format("{}, cut at {} ({}): {}", config_.name, t, loss_name(loss), fault);
    }
    return {};
}

}  // namespace gantry::test
