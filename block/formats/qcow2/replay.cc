// The mapping log of a process that was killed: its mappings go to the file before anything else is done with the
// image.

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"
#include "block/graph.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

void Qcow2Node::attach_log() {
    if (!graph_.mapping_log_source) return;
    Result<UniqueFd> fd = graph_.mapping_log_source(name());
    Result<> attached;
    if (!fd) {
        attached = std::unexpected(std::move(fd).error());
    } else if (*fd) {
        attached = metadata_->log().attach(std::move(*fd));
    }
    if (!attached) {
        log::warn("node '{}': no mapping log, so a killed process loses what was not flushed: {}", name(),
                  attached.error().message());
    }
}

/// What was acknowledged and lived in a memory that is lost: the entries go to the file as they were; counting the
/// references anew is left to the repair, which the dirty bit demands from whoever opens the image next.
Task<Result<>> Qcow2Node::replay_log() {
    const MappingLog& log = metadata_->log();
    if (!log.attached()) co_return Result<>();
    const std::vector<MappingRecord> records = newest(log.records());
    if (records.empty()) co_return Result<>();
    const Header& h = image_.header;
    const auto& session = image_.extensions.session;
    if (h.version < 3 || !h.has_autoclear(kAutoclearSession) || !session || !(session->flags & kSessionOpen) ||
        session->session != log.session()) {
        log::warn("node '{}': a mapping log of another time is not used: the image was closed or written since",
                  name());
        co_return Result<>();
    }
    log::info("node '{}': replaying {} mappings that were not in the image yet", name(), records.size());
    image_.header.incompatible_features |= kIncompatDirty;
    CO_CHECK(co_await metadata_->write_features());
    // What the entries name was acknowledged, not flushed: a power cut in the middle must not find entries without it.
    if (Node* other = data_file()) {
        Request rq = Request::internal();
        CO_CHECK(co_await other->flush(rq));
    }
    CO_CHECK(co_await image_file_.flush());
    for (const MappingRecord& record : records) CO_CHECK(co_await replay(record));
    CO_CHECK(co_await image_file_.flush());
    metadata_->log().start(0);  // nothing in it counts any more, whether somebody writes the image now or not
    co_return Result<>();
}

Task<Result<>> Qcow2Node::replay(MappingRecord record) {
    const Geometry& g = geometry();
    std::array<uint8_t, 16> words;
    store_be64(words.data(), record.word);
    store_be64(words.data() + 8, record.bitmap);
    if (record.kind == MappingRecord::Kind::kL1) {
        if (record.index >= image_.header.l1_size) co_return bad_record(record);
        if (record.index >= image_.l1.size()) image_.l1.resize(record.index + 1);
        image_.l1[record.index] = record.word;
        co_return co_await image_file_.write(image_.header.l1_table_offset + record.index * 8,
                                             std::span(words).first(8), "L1 table");
    }
    const uint64_t l1_index = record.index >> g.l2_bits();
    const uint64_t table = l1_index < image_.l1.size() ? l2_table_offset(image_.l1[l1_index]) : 0;
    if (record.kind != MappingRecord::Kind::kL2 || table == 0 || g.offset_in_cluster(table) != 0) {
        co_return bad_record(record);
    }
    const uint64_t at = table + (record.index & ((uint64_t{1} << g.l2_bits()) - 1)) * g.l2_entry_bytes();
    co_return co_await image_file_.write(at, std::span(words).first(g.l2_entry_bytes()), "L2 table");
}

std::unexpected<Error> Qcow2Node::bad_record(const MappingRecord& record) const {
    return refuse_corrupt(name(), "Could not replay the mapping log",
                          "a record of kind {} for entry {} does not fit the image", static_cast<uint32_t>(record.kind),
                          record.index);
}

}  // namespace gantry::block::qcow2
