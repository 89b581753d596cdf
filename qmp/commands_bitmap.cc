// block-dirty-bitmap-*.

#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "block/bitmap_control.h"
#include "block/bitmap_serialise.h"
#include "block/crypto/hash.h"
#include "qmp/command.h"
#include "runtime/buffer.h"

namespace gantry::qmp {

namespace {

block::BitmapRef bitmap_ref(const json::object& arguments) {
    const schema::Options options(arguments);
    return {.node = options.str("node"), .name = options.str("name")};
}

Task<Result<json::value>> bitmap_add(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    block::BitmapSpec spec{.node = options.str("node"),
                           .name = options.str("name"),
                           .granularity = {},
                           .persistent = options.flag("persistent"),
                           .disabled = options.flag("disabled")};
    if (options.has("granularity")) spec.granularity = static_cast<uint32_t>(options.integer("granularity"));
    co_return done(co_await block::add_bitmap(services.graph, std::move(spec)));
}

Task<Result<json::value>> bitmap_remove(Services& services, json::object arguments) {
    co_return done(co_await block::remove_bitmap(services.graph, bitmap_ref(arguments)));
}

Task<Result<json::value>> bitmap_clear(Services& services, json::object arguments) {
    co_return done(block::clear_bitmap(services.graph, bitmap_ref(arguments)));
}

template <bool on>
Task<Result<json::value>> bitmap_recording(Services& services, json::object arguments) {
    co_return done(block::set_bitmap_recording(services.graph, bitmap_ref(arguments), on));
}

Task<Result<json::value>> bitmap_merge(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const block::BitmapRef target{.node = options.str("node"), .name = options.str("target")};
    std::vector<block::BitmapRef> sources;
    for (const json::value& source : arguments.at("bitmaps").get_array()) {
        if (source.is_string()) {
            sources.push_back({.node = target.node, .name = std::string(source.get_string())});
        } else {
            sources.push_back(bitmap_ref(source.get_object()));
        }
    }
    co_return done(block::merge_bitmaps(services.graph, target, sources));
}

/// Of whole 64-bit words, at least one, as the reference counts them.
Task<Result<json::value>> bitmap_sha256(Services& services, json::object arguments) {
    CO_TRY(const std::shared_ptr<block::DirtyBitmap> bitmap,
           block::lookup_bitmap(services.graph, bitmap_ref(arguments)));
    CO_TRY(Buffer bits, Buffer::try_alloc(std::max<uint64_t>(bitmap->word_count(), 1) * 8));
    block::serialise_piece(*bitmap, 0, bits.span());
    std::array<uint8_t, 32> digest;
    block::crypto::digest(block::crypto::HashAlg::kSha256, {bits.span()}, digest);
    co_return json::value(json::object{{"sha256", fmt::format("{:02x}", fmt::join(digest, ""))}});
}

constexpr HandlerRow kHandlers[] = {
    {"block-dirty-bitmap-add", bitmap_add},
    {"block-dirty-bitmap-remove", bitmap_remove},
    {"block-dirty-bitmap-clear", bitmap_clear},
    {"block-dirty-bitmap-enable", bitmap_recording<true>},
    {"block-dirty-bitmap-disable", bitmap_recording<false>},
    {"block-dirty-bitmap-merge", bitmap_merge},
    {"x-debug-block-dirty-bitmap-sha256", bitmap_sha256},
};

}  // namespace

std::span<const HandlerRow> bitmap_handlers() { return kHandlers; }

}  // namespace gantry::qmp
