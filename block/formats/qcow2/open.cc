// Opening an image: the driver's entry in the table.

#include <sys/stat.h>

#include "block/formats/image_reference.h"
#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/image_loader.h"
#include "block/formats/qcow2/qcow2.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/write_options.h"
#include "block/graph.h"
#include "runtime/blocking_pool.h"
#include "runtime/own_mounts.h"
#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::block {

namespace qcow2 {

namespace {

/// Whether the image becomes writable. Auto-read-only falls back only where the file below cannot be written.
Result<bool> opens_writable(const OpenContext& ctx, const Node& file, const Image& image) {
    const NodeFlags& flags = ctx.flags();
    if (flags.read_only) return false;
    if (flags.auto_read_only && (file.read_only() || image.opened_snapshot)) return false;
    if (!ctx.graph().opens_for_repair || image.opened_snapshot) {
        CHECK_OK(check_may_be_written(image, ctx.node_name()));
    }
    return true;
}

Result<> check_options(const schema::Options& o, const Header& h, std::string_view node) {
    if (o.has("data-file") && !h.has_incompatible(kIncompatDataFile)) {
        return refuse(ErrorKind::kInvalid, node, "'data-file' can only be set for images with an external data file",
                      "incompatible_features at byte 72 are {:#x}", h.incompatible_features);
    }
    return {};
}

Task<Result<>> open_data_file(OpenContext& ctx, const Image& image, std::string base) {
    if (ctx.child_given("data-file")) {
        CO_TRY([[maybe_unused]] Node * node, co_await ctx.open_child("data-file", ChildRole::kData));
        co_return Result<>();
    }
    const std::string& name = image.extensions.data_file;
    if (name.empty()) {
        co_return refuse_corrupt(ctx.node_name(), "'data-file' is required for this image",
                                 "the image keeps its data in another file and does not name it");
    }
    // Whatever it looks like, it is the path of a local file: an untrusted image must not describe nodes here
    // (CVE-2024-4467).
    CO_TRY(std::string path, resolve_local_name(base, name));
    json::object definition{{"driver", "file"}, {"filename", std::move(path)}};
    Result<Node*> opened = co_await ctx.open_implicit("data-file", ChildRole::kData, std::move(definition));
    if (!opened) co_return std::unexpected(std::move(opened).error().context("Could not open data file"));
    co_return Result<>();
}

/// The protocol node of a backing file given by name.
Task<Result<json::object>> protocol_definition(std::string name) {
    CO_TRY(json::object protocol, protocol_options(name));
    if (protocol.at("driver") == "file") {
        const std::string filename(protocol.at("filename").as_string());
        const bool is_device = co_await run_blocking([&] {
            struct stat st{};
            return OwnMounts::process().check_path(filename) && ::stat(filename.c_str(), &st) == 0 &&
                   (S_ISBLK(st.st_mode) || S_ISCHR(st.st_mode));
        });
        if (is_device) protocol["driver"] = "host_device";
    }
    co_return protocol;
}

/// Options of the backing node. Without "driver" where the image does not say the format: it is probed.
Task<Result<json::object>> backing_definition(Graph& graph, std::string name, std::string format) {
    json::object inner;
    if (name.starts_with("json:")) {
        CO_TRY(inner, json_name_options(name));
        const json::value* type = inner.if_contains("driver");
        const Driver* driver = type && type->is_string() ? graph.driver(type->get_string()) : nullptr;
        if (type && !(driver && driver->is_protocol)) co_return inner;  // a format or filter, described completely
        if (!type) {
            const json::value* below = inner.if_contains("file");
            if (!below || !below->is_object()) {
                co_return fail(ErrorKind::kInvalid, "'{}' names neither a driver nor a file", name);
            }
            if (!format.empty()) inner["driver"] = format;
            co_return inner;
        }
    } else {
        CO_TRY(inner, co_await protocol_definition(name));
    }
    if (format.empty()) co_return json::object{{"file", std::move(inner)}};
    const Driver* driver = graph.driver(format);
    if (!driver) co_return fail(ErrorKind::kUnsupported, "Unknown driver '{}'", format);
    if (driver->is_protocol) {  // old images say "file" or "host_device" where they mean raw
        inner["driver"] = format;
        co_return inner;
    }
    co_return json::object{{"driver", format}, {"file", std::move(inner)}};
}

/// What a definition made from an untrusted name must pass before a driver believes its types.
Result<json::object> validated(json::object definition) {
    const schema::Type& type = schema::type("BlockdevOptions");
    if (definition.contains("driver")) return schema::validate(type, std::move(definition));
    TRY(json::object file, schema::validate(type, std::move(definition["file"].as_object())));
    definition["file"] = std::move(file);
    return definition;
}

Task<Result<>> open_backing(OpenContext& ctx, const Image& image) {
    if (ctx.child_refused("backing")) co_return Result<>();
    if (ctx.child_given("backing")) {
        Result<Node*> opened = co_await ctx.open_child("backing", ChildRole::kBacking);
        if (!opened) co_return std::unexpected(std::move(opened).error().context("Could not open backing file"));
        co_return Result<>();
    }
    if (image.backing_name.empty()) co_return Result<>();
    Result<json::object> definition =
        co_await backing_definition(ctx.graph(), image.full_backing_name, image.extensions.backing_format);
    if (definition) definition = validated(std::move(*definition));
    if (!definition) co_return std::unexpected(std::move(definition).error().context("Could not open backing file"));
    Result<Node*> opened = co_await ctx.open_implicit("backing", ChildRole::kBacking, std::move(*definition));
    if (!opened) co_return std::unexpected(std::move(opened).error().context("Could not open backing file"));
    co_return Result<>();
}

Task<Result<std::shared_ptr<Node>>> open(OpenContext& ctx) {
    const std::string& name = ctx.node_name();
    const schema::Options options = ctx.options();
    CO_TRY(Node * file, co_await ctx.open_child("file", ChildRole::kFile));
    CO_TRY(Image image, co_await load_image(*file, name, options.str("snapshot")));
    Qcow2Node::Setup setup;
    CO_TRY(setup.writable, opens_writable(ctx, *file, image));
    CO_CHECK(check_options(options, image.header, name));
    CO_TRY(setup.write, write_options(options, image.header, ctx.flags().discard, name));
    CO_TRY(setup.cipher, co_await open_encryption(*file, image, options.raw(), ctx.graph().secrets(),
                                                  ctx.graph().opens_locked, name));
    CO_TRY(image.caches, cache_sizes(options, image.geometry, image.disk_size, name));

    const std::string base = own_file_name(*file);
    const bool follows_backing = !ctx.child_given("backing") && !ctx.child_refused("backing");
    if (!image.backing_name.empty()) {
        Result<std::string> full = resolve_image_name(base, image.backing_name);
        if (full) {
            image.full_backing_name = std::move(*full);
        } else if (follows_backing) {
            co_return std::unexpected(std::move(full).error().context("Could not open backing file"));
        }
    }
    if (image.geometry.external_data) CO_CHECK(co_await open_data_file(ctx, image, base));
    CO_CHECK(co_await open_backing(ctx, image));
    CO_TRY(std::shared_ptr<Qcow2Node> node,
           Qcow2Node::create(name, ctx.flags(), std::move(image), std::move(setup), ctx.graph()));
    co_return std::shared_ptr<Node>(std::move(node));
}

int probe(const uint8_t* head, size_t size, std::string_view filename) {
    return size >= 8 && load_be32(head) == kMagic && load_be32(head + 4) >= 2 ? 100 : 0;
}

}  // namespace

}  // namespace qcow2

const Driver kQcow2Driver = {.name = "qcow2",
                             .open = qcow2::open,
                             .reopen_options = qcow2::kReopenOptionNames,
                             .probe = qcow2::probe,
                             .creator = &kQcow2Creator};

}  // namespace gantry::block
