// object-add, object-del, query-iothreads, tls-creds-reload.

#include "qmp/command.h"
#include "qmp/objects.h"

namespace gantry::qmp {

namespace {

Task<Result<json::value>> object_add(Services& services, json::object arguments) {
    Result<> added = co_await services.objects.add(std::move(arguments));
    co_return done(std::move(added));
}

Task<Result<json::value>> object_del(Services& services, json::object arguments) {
    co_return done(services.objects.remove(schema::Options(arguments).str("id")));
}

Task<Result<json::value>> query_iothreads(Services& services, json::object) {
    json::array list;
    for (const auto& [id, thread] : services.objects.iothreads()) {
        list.push_back({{"id", id},
                        {"thread-id", thread.loop->thread_id()},
                        {"poll-max-ns", thread.poll_max_ns},
                        {"poll-grow", thread.poll_grow},
                        {"poll-shrink", thread.poll_shrink},
                        {"aio-max-batch", thread.aio_max_batch}});
    }
    co_return json::value(std::move(list));
}

Task<Result<json::value>> tls_creds_reload(Services& services, json::object arguments) {
    Result<> reloaded = co_await services.objects.tls().reload(schema::Options(arguments).str("id"));
    co_return done(std::move(reloaded));
}

constexpr HandlerRow kHandlers[] = {
    {"object-add", object_add},
    {"object-del", object_del},
    {"query-iothreads", query_iothreads},
    {"tls-creds-reload", tls_creds_reload},
};

}  // namespace

std::span<const HandlerRow> object_handlers() { return kHandlers; }

}  // namespace gantry::qmp
