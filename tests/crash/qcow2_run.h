// Qcow2Run: a random workload on a qcow2 image over disks that remember, and the judgement of what power cuts leave.

#pragma once

#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "block/formats/qcow2/qcow2.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "tests/crash/guest_model.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/temp_dir.h"

namespace gantry::test {

struct CrashConfig {
    std::string name = {};
    std::string create = {};   // options of qemu-img create -o
    uint64_t bytes = 2 << 20;  // of the disk
    std::string options = {};  // of the node, `'lazy-refcounts': true, ` and so on
    bool backing = false;      // a backing file with data in every other piece
    bool data_file = false;
    bool compressed = false;  // compressed writes among the others
    bool snapshots = false;
    bool resizes = false;
    bool compacts = false;
    bool amends = false;      // refcount_bits and lazy_refcounts change
    bool bitmap = false;      // a persistent bitmap
    std::string secret = {};  // data of the secret object s0
    unsigned steps = 60;
};

class Qcow2Run : GraphFixture {
  public:
    Qcow2Run(CrashConfig config, uint64_t seed);
    ~Qcow2Run();

    /// Opens the image, works on it, closes it. Everything that fails or reads wrong meanwhile throws.
    void work();
    /// Cuts the power `cuts` times at random and at all interesting moments and judges what is left. The text of the
    /// first fault, "" when there is none.
    std::string cut(unsigned cuts);
    size_t operations() const { return image_->operations(); }

  private:
    struct Range {
        uint64_t first, count;
    };
    Task<void> run_workload(block::Node* node);
    Task<void> guest_operation(block::Node* node, Range range, unsigned kind);
    Task<void> flush(block::Node* node);
    Task<void> verify_now(block::Node* node);
    Task<void> snapshot_step(block::Node* node);
    Task<void> resize_step(block::Node* node);
    Task<void> compact_step(block::Node* node);
    Task<void> amend_step(block::Node* node);
    Range pick();
    std::string secret_option() const;  // of qemu-img
    std::string definition(std::string_view node, std::string_view image, std::string_view data,
                           std::string_view more) const;
    std::string judge(Stamp t, JournalDisk::Loss loss);
    std::string judge_contents(block::Node& node, Stamp t);
    std::string judge_snapshots(Stamp t);
    std::string judge_bitmap(block::Node& node, Stamp t);
    /// What an interrupted operation may leave besides leaks: COPIED missing where a count is 1 (or set where counts
    /// are raised and nothing refers yet): counts and flags lie in different clusters, and no order of writes avoids
    /// it.
    enum class Allowed : uint8_t { kNothing, kLeaks, kFlags };
    std::string check_clean(const char* when, Allowed allowed);
    std::string qemu_check(const std::vector<uint8_t>& bytes, Allowed allowed);
    bool in_snapshot_operation(Stamp t) const;

    CrashConfig config_;
    std::mt19937_64 random_;
    TempDir dir_;
    StampClock clock_;
    std::shared_ptr<JournalDisk> image_, data_;
    std::unique_ptr<GuestModel> guest_;
    uint64_t cluster_sectors_ = 128;
    std::vector<Range> busy_;
    std::vector<std::pair<Stamp, Stamp>> operations_;  // on snapshots: begun, ended
    unsigned snapshot_count_ = 0;
    unsigned judged_ = 0;
};

}  // namespace gantry::test
