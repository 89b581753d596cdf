// getfd, closefd, add-fd, remove-fd, query-fdsets.

#include "qmp/command.h"
#include "qmp/descriptors.h"
#include "runtime/fd_sets.h"

namespace gantry::qmp {

namespace {

Result<UniqueFd> passed_descriptor(Services& services) {
    if (!services.descriptors || !services.descriptors->passed) {
        return fail(ErrorKind::kInvalid, "No file descriptor supplied via SCM_RIGHTS");
    }
    return std::move(services.descriptors->passed);
}

Result<> check_name(const std::string& name) {
    if (!name.empty() && (name[0] < '0' || name[0] > '9')) return {};
    return fail(ErrorKind::kInvalid, "Parameter 'fdname' expects a name not starting with a digit");
}

Task<Result<json::value>> getfd(Services& services, json::object arguments) {
    const std::string name = schema::Options(arguments).str("fdname");
    CO_TRY(UniqueFd fd, passed_descriptor(services));
    CO_CHECK(check_name(name));
    services.descriptors->put(name, std::move(fd));
    co_return json::value(json::object());
}

Task<Result<json::value>> closefd(Services& services, json::object arguments) {
    const std::string name = schema::Options(arguments).str("fdname");
    if (!services.descriptors || !services.descriptors->take(name)) {
        co_return fail(ErrorKind::kNotFound, "File descriptor named '{}' not found", name);
    }
    co_return json::value(json::object());
}

Task<Result<json::value>> add_fd(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    CO_TRY(UniqueFd fd, passed_descriptor(services));
    std::optional<int64_t> id;
    if (options.has("fdset-id")) id = options.integer("fdset-id");
    std::optional<std::string> opaque;
    if (options.has("opaque")) opaque = options.str("opaque");
    CO_TRY(const auto added, FdSets::process().add(std::move(fd), id, std::move(opaque)));
    co_return json::value(json::object{{"fdset-id", added.first}, {"fd", added.second}});
}

Task<Result<json::value>> remove_fd(Services&, json::object arguments) {
    const schema::Options options(arguments);
    std::optional<int64_t> fd;
    if (options.has("fd")) fd = options.integer("fd");
    co_return done(FdSets::process().remove(options.integer("fdset-id"), fd));
}

Task<Result<json::value>> query_fdsets(Services&, json::object) {
    json::array sets;
    for (const FdSets::Set& set : FdSets::process().list()) {
        json::array members;
        for (const FdSets::Member& member : set.members) {
            json::object shown{{"fd", member.fd}};
            if (member.opaque) shown["opaque"] = *member.opaque;
            members.push_back(std::move(shown));
        }
        sets.push_back({{"fdset-id", set.id}, {"fds", std::move(members)}});
    }
    co_return json::value(std::move(sets));
}

constexpr HandlerRow kHandlers[] = {
    {"getfd", getfd},         {"closefd", closefd},           {"add-fd", add_fd},
    {"remove-fd", remove_fd}, {"query-fdsets", query_fdsets},
};

}  // namespace

std::span<const HandlerRow> fd_handlers() { return kHandlers; }

}  // namespace gantry::qmp
