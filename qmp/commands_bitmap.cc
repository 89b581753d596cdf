// block-dirty-bitmap-*.

#include "block/bitmap_control.h"
#include "qmp/command.h"

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

constexpr HandlerRow kHandlers[] = {
    {"block-dirty-bitmap-add", bitmap_add},
    {"block-dirty-bitmap-remove", bitmap_remove},
    {"block-dirty-bitmap-clear", bitmap_clear},
    {"block-dirty-bitmap-enable", bitmap_recording<true>},
    {"block-dirty-bitmap-disable", bitmap_recording<false>},
    {"block-dirty-bitmap-merge", bitmap_merge},
};

}  // namespace

std::span<const HandlerRow> bitmap_handlers() { return kHandlers; }

}  // namespace gantry::qmp
