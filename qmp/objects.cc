#include "qmp/objects.h"

#include <latch>

#include "schema/identifier.h"
#include "schema/options.h"

namespace gantry::qmp {

namespace {

Result<int64_t> non_negative(const schema::Options& options, std::string_view key, int64_t fallback) {
    int64_t value = options.integer(key, fallback);
    if (value < 0) return fail(ErrorKind::kInvalid, "{} value must be in range [0, 9223372036854775807]", key);
    return value;
}

}  // namespace

Objects::Objects(Runtime& runtime, exports::Registry& exports, block::crypto::Secrets& secrets)
    : runtime_(runtime), exports_(exports), secrets_(secrets), tls_(secrets) {
    // Each asks about ids that are not its own.
    secrets_.set_other_objects([this](std::string_view id) { return exists(id); });
    tls_.set_other_objects([this](std::string_view id) { return exists(id); });
    authz_.set_other_objects([this](std::string_view id) { return exists(id); });
}

bool Objects::exists(std::string_view id) const {
    return iothreads_.contains(id) || secrets_.has(id) || tls_.has(id) || authz_.has(id);
}

Task<Result<>> Objects::add(json::object raw) {
    const schema::Options options(raw);
    const std::string id = options.str("id");
    if (!schema::is_identifier(id)) {
        co_return fail(
            ErrorKind::kInvalid,
            "Parameter 'id' expects an identifier; '{}' is not letters, digits, '-', '.', '_' after a letter", id);
    }
    if (exists(id) || coming_.contains(id)) {
        co_return fail(ErrorKind::kExists, "attempt to add duplicate property '{}' to object (type 'container')", id);
    }
    const std::string type = options.str("qom-type");
    coming_.insert(id);
    Result<> added = co_await add_kind(type, std::move(raw));
    coming_.erase(id);
    co_return added;
}

Task<Result<>> Objects::add_kind(std::string type, json::object raw) {
    Result<> added;
    if (type == "iothread") {
        added = add_iothread(raw);
    } else if (type.starts_with("tls-creds-")) {
        added = co_await tls_.add(std::move(raw));
    } else if (type.starts_with("authz-")) {
        added = co_await authz_.add(std::move(raw));
    } else {
        CHECK(type == "secret" || type == "secret_keyring", "the schema lists the object types that exist");
        added = co_await secrets_.add(std::move(raw));
    }
    co_return added;
}

Result<> Objects::add_iothread(const json::object& raw) {
    const schema::Options options(raw);
    std::string id = options.str("id");
    IoThread thread;
    TRY(thread.poll_max_ns, non_negative(options, "poll-max-ns", thread.poll_max_ns));
    TRY(thread.poll_grow, non_negative(options, "poll-grow", 0));
    TRY(thread.poll_shrink, non_negative(options, "poll-shrink", 0));
    TRY(thread.aio_max_batch, non_negative(options, "aio-max-batch", 0));
    TRY(int64_t pool_min, non_negative(options, "thread-pool-min", 0));
    TRY(int64_t pool_max, non_negative(options, "thread-pool-max", 64));
    if (pool_min > pool_max) {
        return fail(ErrorKind::kInvalid, "bad thread-pool-min/thread-pool-max values: {} is larger than {}", pool_min,
                    pool_max);
    }
    TRY(thread.loop, runtime_.add_loop(id, std::chrono::nanoseconds(thread.poll_max_ns)));
    // Its thread id is asked for by whoever wants to pin it: from the start, not once the thread was scheduled.
    std::latch running(1);
    thread.loop->post([&running] { running.count_down(); });
    running.wait();
    if (auto added = exports_.add_iothread(id, thread.loop); !added) {
        runtime_.remove_loop(thread.loop);
        return added;
    }
    iothreads_.emplace(std::move(id), thread);
    return {};
}

Result<> Objects::remove(std::string_view id) {
    if (secrets_.remove(id) || authz_.remove(id)) return {};
    if (tls_.has(id)) return tls_.remove(id);
    auto it = iothreads_.find(id);
    if (it == iothreads_.end()) return fail(ErrorKind::kNotFound, "object '{}' not found", id);
    if (auto removed = exports_.remove_iothread(id); !removed) {
        return fail(ErrorKind::kBusy, "object '{}' is in use, can not be deleted; {}", id, removed.error().message());
    }
    runtime_.remove_loop(it->second.loop);
    iothreads_.erase(it);
    return {};
}

void Objects::clear() {
    while (!iothreads_.empty()) {
        auto it = iothreads_.begin();
        (void)exports_.remove_iothread(it->first);
        runtime_.remove_loop(it->second.loop);
        iothreads_.erase(it);
    }
    tls_.clear();
    authz_.clear();
    secrets_.clear();
}

}  // namespace gantry::qmp
