#include "block/formats/raw.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "block/protocols/file_create.h"

namespace gantry::block {

namespace {

/// [offset, offset + size) of the file; without `size` up to its end, also when that moves.
struct Window {
    uint64_t offset = 0;
    std::optional<uint64_t> size;

    static Result<Window> from(const json::object& options, uint64_t file_size) {
        const schema::Options o(options);
        for (const char* name : {"offset", "size"}) {
            if (o.integer(name) < 0) return fail(ErrorKind::kInvalid, "Parameter '{}' expects a >=0 value", name);
        }
        Window window{.offset = o.size("offset"), .size = {}};
        if (o.has("size")) window.size = o.size("size");
        if (window.offset > file_size)
            return fail(ErrorKind::kInvalid, "Offset ({}) cannot be greater than size of the containing file ({})",
                        window.offset, file_size);
        if (window.size && *window.size > file_size - window.offset)
            return fail(ErrorKind::kInvalid,
                        "The sum of offset ({}) and size ({}) has to be smaller or equal to the  actual size of the "
                        "containing file ({})",
                        window.offset, *window.size, file_size);
        return window;
    }
    uint64_t length(uint64_t file_size) const {
        if (size) return *size;
        return file_size > offset ? file_size - offset : 0;
    }
};

/// Any loop. Requests arrive inside the window (the request layer has checked size()).
class RawNode final : public Filter {
  public:
    RawNode(const OpenContext& context, const Node& file, Window window)
        : Filter("raw", context.node_name(), context.flags()), window_(window) {
        follow(file);
        allow_fast_paths(true, true);
    }

    Task<Result<>> do_read(Request& rq, uint64_t offset, IoVec iov) override {
        return below().read(rq, at(offset), iov);
    }
    Task<Result<>> do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) override {
        return below().write(rq, at(offset), iov, flags);
    }
    Task<Result<>> do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override {
        return below().write_zeroes(rq, at(offset), length, flags);
    }
    Task<Result<>> do_discard(Request& rq, uint64_t offset, uint64_t length) override {
        return below().discard(rq, at(offset), length);
    }
    Task<Result<>> do_preload(Request& rq, uint64_t offset, uint64_t length) override {
        return below().preload(rq, at(offset), length);
    }
    Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length) override {
        return below().block_status(rq, at(offset), length);
    }
    Task<Result<size_t>> do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                           std::span<BlockStatus> out) override {
        return below().block_statuses(rq, at(offset), length, out);
    }
    int do_try_read(Request& rq, uint64_t offset, const IoVec& iov) override {
        return below().try_read(rq, at(offset), iov);
    }
    int do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) override {
        return below().try_write(rq, at(offset), iov, flags);
    }

    Task<Result<>> do_resize(uint64_t new_size) override {
        if (window_.size) co_return fail(ErrorKind::kUnsupported, "Cannot resize fixed-size raw disks");
        if (new_size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) - window_.offset)
            co_return fail(ErrorKind::kInvalid, "Disk size too large for the chosen offset");
        CO_CHECK(co_await below().do_resize(window_.offset + new_size));
        follow(below());
        co_return Result<>();
    }

    void children_changed() override { follow(below()); }

    Task<Result<>> prepare_reopen(const json::object& options, const NodeFlags& flags) override {
        CO_CHECK(co_await Filter::prepare_reopen(options, flags));
        CO_TRY(next_, Window::from(options, below().size()));
        co_return Result<>();
    }
    void commit_reopen() override {
        window_ = next_;
        follow(below());
    }

    Result<Passthrough> passthrough() override {
        // A plain descriptor knows no end: a window that ends before its file would let the holder see what lies
        // behind.
        if (at(size()) < below().size())
            return fail(ErrorKind::kUnsupported, "node '{}' shows only a part of its file", name());
        TRY(Passthrough inner, below().passthrough());
        inner.offset += window_.offset;
        return inner;
    }

  private:
    uint64_t at(uint64_t offset) const { return window_.offset + offset; }

    void follow(const Node& file) {
        // The file's own request layer aligns and splits; were it done here too, a unit that reaches beyond an odd end
        // would be refused below, and everything would be looked at twice.
        const Limits& lower = file.limits();
        limits_ = {};
        limits_.supports_fua = true;
        limits_.supports_zeroes = true;
        limits_.can_grow_by_write = lower.can_grow_by_write && !window_.size;
        limits_.optimal_transfer =
            std::max(lower.optimal_transfer, lower.request_alignment > 1 ? lower.request_alignment : 0);
        set_size(window_.length(file.size()));
    }

    Window window_;
    Window next_;  // of a reopen that is being prepared
};

Task<Result<std::shared_ptr<Node>>> open_raw(OpenContext& context) {
    CO_TRY(Node * file, co_await context.open_child("file", ChildRole::kFiltered));
    CO_TRY(const Window window, Window::from(context.options().raw(), file->size()));
    co_return std::make_shared<RawNode>(context, *file, window);
}

constexpr std::string_view kReopenOptions[] = {"offset", "size"};

}  // namespace

constinit const Driver kRawDriver{
    .name = "raw", .open = open_raw, .reopen_options = kReopenOptions, .creator = &kRawCreator};

}  // namespace gantry::block
