#include "block/formats/qcow2/check.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/image_loader.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr int kRepairRounds = 4;

/// A look at everything, and what a repair wants to know of it.
struct Look {
    ImageCheck found;
    uint64_t structural = 0;  // corruptions besides flags
    bool unseen = false;
    std::unordered_set<uint64_t> adopted;
    Contested contested;

    bool clean() const { return found.check_errors == 0 && found.corruptions == 0 && found.leaks == 0; }
};

Task<Result<Look>> look(ImageFile& file, Image& image, CheckProgress& progress) {
    CO_CHECK(check_file_size(file, image.geometry));
    CheckRun run(file, image, progress);
    CO_CHECK(co_await count_references(run));
    CO_CHECK(co_await compare_counts(run, CountChange::kNone, true));
    Look result;
    result.structural = run.found.corruptions;
    CO_CHECK(co_await check_flags(run));
    result.found = std::move(run.found);
    result.unseen = run.unseen;
    result.adopted = std::move(run.adopted);
    result.contested = std::move(run.contested);
    co_return result;
}

/// The active L1 table as it is now; those that keep it in `image` follow.
Task<Result<>> reload_l1(ImageFile& file, Image& image) {
    if (image.opened_snapshot || image.l1.empty()) co_return Result<>();
    Buffer table = Buffer::alloc(image.l1.size() * 8);
    CO_CHECK(co_await file.read(image.header.l1_table_offset, table.span(), "L1 table"));
    for (size_t i = 0; i < image.l1.size(); i++) image.l1[i] = load_be64(table.data() + i * 8);
    co_return Result<>();
}

/// Sets or clears the bit that keeps everybody from writing; false when it is so already or the version has none.
Task<Result<bool>> mark_corrupt(ImageFile& file, Image& image, bool corrupt) {
    if (image.header.version < 3 || image.header.has_incompatible(kIncompatCorrupt) == corrupt) co_return false;
    Header header = image.header;
    header.incompatible_features ^= kIncompatCorrupt;
    CO_CHECK(co_await write_feature_words(file, header));
    image.header.incompatible_features = header.incompatible_features;
    co_return true;
}

/// Lowers counts that are too high, and then, when nothing else is wrong, mends flags that depended on them. Returns
/// the number of flags.
Task<Result<uint64_t>> repair_leaks(ImageFile& file, Image& image, const Look& seen, CheckProgress& progress) {
    if (seen.unseen || seen.found.check_errors > 0) co_return 0;
    CheckRun run(file, image, progress);
    CO_CHECK(co_await count_references(run));
    CO_CHECK(co_await compare_counts(run, CountChange::kLower, true));
    CO_CHECK(co_await run.file.flush());
    if (seen.structural > 0) co_return 0;
    run.contested = seen.contested;
    run.fix = true;
    const uint64_t before = run.found.corruptions;
    CO_CHECK(co_await check_flags(run));
    CO_CHECK(co_await run.file.flush());
    if (run.l1_changed) CO_CHECK(co_await reload_l1(file, image));
    co_return run.found.corruptions - before;
}

/// One round of: references that lead nowhere, counts, flags. Returns the number of flags.
Task<Result<uint64_t>> repair_all(ImageFile& file, Image& image, const Look& seen, CheckProgress& progress) {
    CheckRun run(file, image, progress);
    run.fix = true;
    run.adopted = seen.adopted;
    run.contested = seen.contested;
    CO_CHECK(co_await count_references(run));
    if (run.mended > 0) CO_CHECK(co_await file.flush());
    if (run.l1_changed) CO_CHECK(co_await reload_l1(file, image));
    // Counts that are missing altogether show only in a comparison. While some references cannot be followed, what is
    // stored about them stays.
    CO_CHECK(co_await compare_counts(run, CountChange::kRaise, run.unseen));
    CO_CHECK(co_await file.flush());
    if (run.rebuild) {
        if (run.unreadable) {
            co_return fail(ErrorKind::kIo,
                           "node '{}': the refcounts of the image cannot be made anew while parts of its metadata "
                           "cannot be read",
                           file.node_name());
        }
        CO_CHECK(co_await rebuild_refcounts(run));
    } else if (!run.unseen) {
        CO_CHECK(co_await compare_counts(run, CountChange::kLower, false));
        CO_CHECK(co_await file.flush());
    }
    run.l1_changed = false;
    const uint64_t before = run.found.corruptions;
    CO_CHECK(co_await check_flags(run));
    CO_CHECK(co_await file.flush());
    if (run.l1_changed) CO_CHECK(co_await reload_l1(file, image));
    co_return run.found.corruptions - before;
}

Task<Result<>> mark_clean(ImageFile& file, Image& image) {
    constexpr uint64_t kMarks = kIncompatDirty | kIncompatCorrupt;
    if (image.header.version < 3 || !image.header.has_incompatible(kMarks)) co_return Result<>();
    Header header = image.header;
    header.incompatible_features &= ~kMarks;
    CO_CHECK(co_await write_feature_words(file, header));
    image.header.incompatible_features = header.incompatible_features;
    co_return Result<>();
}

uint64_t fewer(uint64_t before, uint64_t after) { return before > after ? before - after : 0; }

}  // namespace

Task<Result<ImageCheck>> check_metadata(ImageFile& file, Image& image, CheckRepair repair, Progress tell) {
    CheckProgress progress;
    progress.tell = std::move(tell);
    CO_TRY(Look now, co_await look(file, image, progress));
    if (repair == CheckRepair::kNone) co_return std::move(now.found);

    const uint64_t first_corruptions = now.structural, first_leaks = now.found.leaks;
    std::vector<std::string> findings = now.found.findings;
    uint64_t flags = 0;
    const bool was_corrupt = image.header.has_incompatible(kIncompatCorrupt);
    bool tried = false;
    for (int round = 0; round < kRepairRounds && !now.clean(); round++) {
        const uint64_t before = now.found.corruptions + now.found.leaks;
        uint64_t flags_now = 0;
        if (repair == CheckRepair::kAll) {
            // Whatever interrupts the repair, nobody else writes before it has been done again.
            if (now.found.corruptions > 0) {
                CO_TRY([[maybe_unused]] const bool marked, co_await mark_corrupt(file, image, true));
            }
            CO_TRY(flags_now, co_await repair_all(file, image, now, progress));
        } else {
            CO_TRY(flags_now, co_await repair_leaks(file, image, now, progress));
        }
        if (!tried) flags = flags_now;
        tried = true;
        CO_TRY(now, co_await look(file, image, progress));
        if (now.found.corruptions + now.found.leaks >= before && round > 0) break;
    }
    if (now.found.corruptions == 0 && now.found.check_errors == 0) {
        CO_CHECK(co_await mark_clean(file, image));
    } else if (!was_corrupt) {
        CO_TRY([[maybe_unused]] const bool unmarked, co_await mark_corrupt(file, image, false));
    }
    ImageCheck result = std::move(now.found);
    if (tried) {
        result.corruptions_fixed = fewer(first_corruptions + flags, result.corruptions);
        result.leaks_fixed = fewer(first_leaks, result.leaks);
        // What was found first tells more than what is left.
        result.findings = std::move(findings);
    }
    co_return result;
}

Task<Result<uint64_t>> reclaim_leaks(ImageFile& file, Image& image) {
    CO_TRY(const ImageCheck check, co_await check_metadata(file, image, CheckRepair::kLeaks, {}));
    if (check.corruptions > 0 || check.check_errors > 0) {
        log::error("node '{}': the image has {} corruptions and {} errors; the first: {}; check it with a repair",
                   file.node_name(), check.corruptions, check.check_errors,
                   check.findings.empty() ? "-" : check.findings.front());
    }
    co_return check.leaks_fixed;
}

Task<Result<ImageCheck>> check_file(Node& node, std::string name, CheckRepair repair, Progress progress) {
    CO_TRY(Image image, co_await load_image(node, name, ""));
    ImageFile file(std::move(name), node);
    co_return co_await check_metadata(file, image, repair, std::move(progress));
}

}  // namespace gantry::block::qcow2
