// The backing file that the header names; the node's child stays as it is.

#include "block/formats/image_reference.h"
#include "block/formats/qcow2/operation.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

Result<> check_names(const Geometry& geometry, std::string_view node, const std::string& file,
                     const std::string& format) {
    const std::string sentence = fmt::format("Could not change backing file to '{}': Invalid argument", file);
    if (!file.empty() && geometry.raw_external_data) {
        return refuse(ErrorKind::kInvalid, node, sentence,
                      "its raw data file alone is the disk; a backing file would not show");
    }
    if (file.size() > kMaxBackingNameBytes) {
        return refuse(ErrorKind::kInvalid, node, sentence, "the name has {} bytes, at most {}", file.size(),
                      kMaxBackingNameBytes);
    }
    if (format.size() > kMaxBackingFormatBytes) {
        return refuse(ErrorKind::kInvalid, node, sentence, "the format name has {} bytes, at most {}", format.size(),
                      kMaxBackingFormatBytes);
    }
    if (file.find('\0') != std::string::npos || format.find('\0') != std::string::npos) {
        return refuse(ErrorKind::kInvalid, node, sentence, "a name has a NUL byte in it");
    }
    return {};
}

}  // namespace

Task<Result<>> Qcow2Node::change_backing(std::string file_name, std::string format) {
    CO_CHECK(check_writable());
    if (file_name.empty()) format.clear();
    CO_CHECK(check_names(geometry(), name(), file_name, format));
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    std::string old_name = std::exchange(image_.backing_name, file_name);
    std::string old_format = std::exchange(image_.extensions.backing_format, format);
    Result<> written = co_await metadata_->write_header();
    if (!written) {
        image_.backing_name = std::move(old_name);
        image_.extensions.backing_format = std::move(old_format);
        co_return std::unexpected(
            std::move(written).error().context(fmt::format("Could not change backing file to '{}'", file_name)));
    }
    image_.full_backing_name.clear();
    if (!file_name.empty()) {
        Result<std::string> full = resolve_image_name(own_file_name(file()), file_name);
        if (full) image_.full_backing_name = std::move(*full);
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
