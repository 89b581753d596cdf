#include "nbd/handshake/export_info.h"

#include "nbd/handshake/payload.h"

namespace gantry::nbd {

namespace {

void info_text(OptionOutput& out, InfoType type, std::string_view text) {
    std::vector<uint8_t> reply(2);
    store_big(reply.data(), static_cast<uint16_t>(type));
    reply.insert(reply.end(), text.begin(), text.end());
    out.reply(kRepInfo, reply);
}

}  // namespace

std::optional<std::string> send_export_info(Handshake& hs, Payload payload, OptionOutput& out, InfoPurpose purpose) {
    std::string_view why;
    const auto request = parse_info_request(payload, why);
    if (!request) {
        out.error(kRepErrInvalid, why);
        return std::nullopt;
    }
    const auto facts = hs.exports().find(request->name);
    if (!facts) {
        out.error(kRepErrUnknown, "no export named " + quote(request->name));
        return std::nullopt;
    }
    if (request->wants_name) info_text(out, kInfoName, facts->name);
    if (!facts->description.empty()) info_text(out, kInfoDescription, facts->description);

    // Who enters without having asked for the limits does not know them: the block layer aligns its requests.
    const bool binding = purpose == InfoPurpose::kInfo || request->wants_block_size;
    uint8_t sizes[14];
    uint8_t* p = store_big(sizes, static_cast<uint16_t>(kInfoBlockSize));
    p = store_big(p, binding ? facts->minimum_block : uint32_t{1});
    p = store_big(p, facts->preferred_block);
    store_big(p, facts->maximum_payload);
    out.reply(kRepInfo, sizes);

    uint8_t about[12];
    p = store_big(about, static_cast<uint16_t>(kInfoExport));
    p = store_big(p, facts->size);
    store_big(p, hs.transmission_flags(request->name, *facts));
    out.reply(kRepInfo, about);

    if (purpose == InfoPurpose::kInfo && !request->wants_block_size && facts->minimum_block > 1) {
        out.error(kRepErrBlockSizeRequired, "ask for NBD_INFO_BLOCK_SIZE to use this export");
        return std::nullopt;
    }
    return std::string(request->name);
}

}  // namespace gantry::nbd
