// gantry status: the daemons of this user and what they export.

#include <cstdio>
#include <map>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/qmp_client.h"
#include "cli/readable.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"qmp", 0, true, "SOCKET", "only the daemon behind this control socket"},
    {"json", 0, false, "", "print JSON"},
    {"help", 'h', false, "", "show this"},
};

std::string text_of(const json::object& object, std::string_view key) {
    const json::value* v = object.if_contains(key);
    return v && v->is_string() ? std::string(v->get_string()) : std::string();
}

uint64_t number_of(const json::object& object, std::string_view key) {
    const json::value* v = object.if_contains(key);
    if (!v) return 0;
    if (v->is_uint64()) return v->get_uint64();
    return v->is_int64() ? static_cast<uint64_t>(v->get_int64()) : 0;
}

/// Everything a daemon says about itself, under the names of the commands.
Result<json::object> ask(const std::string& socket) {
    TRY(QmpClient client, QmpClient::connect(socket));
    json::object out{{"socket", socket}, {"version", client.version()}};
    for (std::string_view command : {"query-block-exports", "query-jobs", "query-nbd-servers", "query-fuse-exports",
                                     "query-vhost-user-exports", "query-vduse-exports"}) {
        TRY(json::value reply, client.execute(command, {}));
        out[command] = std::move(reply);
    }
    TRY(json::value nodes, client.execute("query-named-block-nodes", {{"flat", true}}));
    TRY(json::value stats, client.execute("query-blockstats", {{"query-nodes", true}}));
    out["query-named-block-nodes"] = std::move(nodes);
    out["query-blockstats"] = std::move(stats);
    return out;
}

const json::array& list_of(const json::object& object, std::string_view key) {
    static const json::array kEmpty;
    const json::value* v = object.if_contains(key);
    return v && v->is_array() ? v->get_array() : kEmpty;
}

void print_servers(const json::object& daemon) {
    std::vector<std::vector<std::string>> rows{
        {"CLIENT", "EXPORT", "TLS SUBJECT", "REQUESTS", "IN FLIGHT", "READ", "WRITTEN", "SECONDS"}};
    for (const json::value& item : list_of(daemon, "query-nbd-servers")) {
        const json::object& server = item.get_object();
        const std::string id = text_of(server, "id");
        std::string addresses;
        for (const json::value& address : list_of(server, "addresses")) {
            addresses += fmt::format(" {}", std::string_view(address.get_string()));
        }
        std::printf("NBD server%s%s:%s\n", id.empty() ? "" : " ", id.c_str(), addresses.c_str());
        for (const json::value& c : list_of(server, "clients")) {
            const json::object& client = c.get_object();
            const std::string name = text_of(client, "name"), subject = text_of(client, "tls-subject");
            const bool entered = client.contains("export");
            rows.push_back(
                {text_of(client, "address"),
                 !entered       ? "(handshake)"
                 : name.empty() ? "\"\""
                                : name,
                 subject.empty() ? "-" : subject, std::to_string(number_of(client, "requests")),
                 std::to_string(number_of(client, "in-flight")), readable_size(number_of(client, "bytes-read")),
                 readable_size(number_of(client, "bytes-written")), std::to_string(number_of(client, "seconds"))});
        }
    }
    if (rows.size() > 1) std::fputs(table(rows).c_str(), stdout);
}

bool flag_of(const json::object& object, std::string_view key) {
    const json::value* v = object.if_contains(key);
    return v && v->is_bool() && v->get_bool();
}

void print_files(const json::object& daemon) {
    for (const json::value& item : list_of(daemon, "query-fuse-exports")) {
        const json::object& file = item.get_object();
        uint64_t requests = 0, read = 0, written = 0;
        size_t busy = 0;
        for (const json::value& q : list_of(file, "queues")) {
            const json::object& queue = q.get_object();
            requests += number_of(queue, "requests");
            read += number_of(queue, "bytes-read");
            written += number_of(queue, "bytes-written");
            busy += number_of(queue, "requests") != 0;
        }
        std::printf("FUSE export %s on %s: %s%s; open %llu times; %llu requests in %zu of %zu queues",
                    text_of(file, "id").c_str(), text_of(file, "mountpoint").c_str(),
                    text_of(file, "transport-reason").c_str(),
                    flag_of(file, "passthrough") ? ", data passed through by the kernel" : "",
                    static_cast<unsigned long long>(number_of(file, "open-files")),
                    static_cast<unsigned long long>(requests), busy, list_of(file, "queues").size());
        std::printf(", %s read, %s written; %s; %s\n", readable_size(read).c_str(), readable_size(written).c_str(),
                    flag_of(file, "allow-other") ? "for other users, too" : "for this user alone",
                    flag_of(file, "kept-for-restart")
                        ? "survives a restart"
                        : ("does not survive a restart: " + text_of(file, "kept-reason")).c_str());
    }
}

/// "2 queues run, 3 requests in flight; ..."
std::string queues_line(const json::object& device) {
    uint64_t in_flight = 0, requests = 0, read = 0, written = 0, kicks = 0, signals = 0;
    size_t running = 0;
    for (const json::value& q : list_of(device, "queues")) {
        const json::object& queue = q.get_object();
        in_flight += number_of(queue, "in-flight");
        requests += number_of(queue, "requests");
        read += number_of(queue, "bytes-read");
        written += number_of(queue, "bytes-written");
        kicks += number_of(queue, "kicks");
        signals += number_of(queue, "signals");
        running += flag_of(queue, "running");
    }
    return fmt::format("{} queues run, {} requests in flight; {} requests, {} kicks, {} signals, {} read, {} written",
                       running, in_flight, requests, kicks, signals, readable_size(read), readable_size(written));
}

void print_broken_queues(const json::object& device) {
    for (const json::value& q : list_of(device, "queues")) {
        const std::string broken = text_of(q.get_object(), "broken");
        if (broken.empty()) continue;
        std::printf("  queue %llu is not served any more: %s\n",
                    static_cast<unsigned long long>(number_of(q.get_object(), "index")), broken.c_str());
    }
}

void print_vhost_user_disks(const json::object& daemon) {
    for (const json::value& item : list_of(daemon, "query-vhost-user-exports")) {
        const json::object& disk = item.get_object();
        std::printf("vhost-user-blk export %s on %s: ", text_of(disk, "id").c_str(), text_of(disk, "socket").c_str());
        const json::value* found = disk.if_contains("front-end");
        if (!found) {
            std::printf("no virtual machine is connected\n");
            continue;
        }
        const json::object& front = found->get_object();
        std::printf("%s; %s; %s%s\n", text_of(front, "peer").c_str(), queues_line(front).c_str(),
                    flag_of(front, "inflight-tracking") ? "survives a restart" : "requests are lost in a crash",
                    flag_of(front, "dirty-log") ? "; migration under way" : "");
        if (const std::string waiting = text_of(front, "waits-for-answer-to"); !waiting.empty()) {
            std::printf("  the virtual machine waits for the answer to %s\n", waiting.c_str());
        }
        print_broken_queues(front);
    }
}

void print_vduse_disks(const json::object& daemon) {
    for (const json::value& item : list_of(daemon, "query-vduse-exports")) {
        const json::object& disk = item.get_object();
        const std::string kept = text_of(disk, "kept-reason");
        std::printf("vduse-blk export %s as VDUSE device %s: %s; %s; features %#llx%s\n", text_of(disk, "id").c_str(),
                    text_of(disk, "name").c_str(),
                    !flag_of(disk, "attached")  ? "not attached to the vDPA bus"
                    : !flag_of(disk, "running") ? "attached, no driver uses it"
                                                : "attached, its driver runs",
                    queues_line(disk).c_str(), static_cast<unsigned long long>(number_of(disk, "features")),
                    flag_of(disk, "kept-for-restart") ? "; survives a restart"
                    : kept.empty()                    ? ""
                                                      : ("; does not survive a restart: " + kept).c_str());
        print_broken_queues(disk);
    }
}

void print_daemon(const json::object& daemon) {
    std::printf("%s\n", text_of(daemon, "socket").c_str());
    std::map<std::string, const json::object*> nodes, stats;
    for (const json::value& node : list_of(daemon, "query-named-block-nodes")) {
        nodes[text_of(node.get_object(), "node-name")] = &node.get_object();
    }
    for (const json::value& node : list_of(daemon, "query-blockstats"))
        stats[text_of(node.get_object(), "node-name")] = &node.get_object();

    std::vector<std::vector<std::string>> rows{{"EXPORT", "TYPE", "NODE", "DRIVER", "MODE", "SIZE", "READ", "WRITTEN"}};
    for (const json::value& item : list_of(daemon, "query-block-exports")) {
        const json::object& e = item.get_object();
        std::string name = text_of(e, "node-name");
        std::vector<std::string> row{text_of(e, "id"), text_of(e, "type"), name};
        if (auto it = nodes.find(name); it != nodes.end()) {
            const json::object& node = *it->second;
            const json::value* ro = node.if_contains("ro");
            row.push_back(text_of(node, "drv"));
            row.push_back(ro && ro->is_bool() && ro->get_bool() ? "ro" : "rw");
            const json::value* image = node.if_contains("image");
            row.push_back(readable_size(image ? number_of(image->get_object(), "virtual-size") : 0));
        }
        if (auto it = stats.find(name); it != stats.end()) {
            const json::value* s = it->second->if_contains("stats");
            if (s && s->is_object()) {
                row.push_back(readable_size(number_of(s->get_object(), "rd_bytes")));
                row.push_back(readable_size(number_of(s->get_object(), "wr_bytes")));
            }
        }
        rows.push_back(std::move(row));
    }
    if (rows.size() == 1) {
        std::puts("  no exports");
    } else {
        std::fputs(table(rows).c_str(), stdout);
    }
    print_servers(daemon);
    print_files(daemon);
    print_vhost_user_disks(daemon);
    print_vduse_disks(daemon);
    for (const json::value& item : list_of(daemon, "query-jobs")) {
        const json::object& job = item.get_object();
        std::printf("job %s (%s): %s, %llu of %llu\n", text_of(job, "id").c_str(), text_of(job, "type").c_str(),
                    text_of(job, "status").c_str(), static_cast<unsigned long long>(number_of(job, "current-progress")),
                    static_cast<unsigned long long>(number_of(job, "total-progress")));
    }
}

}  // namespace

int status_command(std::span<const char* const> arguments) {
    auto parsed = parse_options(kOptions, arguments);
    if (!parsed) {
        std::fprintf(stderr, "gantry status: %s\n", parsed.error().message().c_str());
        return 2;
    }
    std::vector<std::string> sockets;
    bool as_json = false;
    for (const OptionUse& option : *parsed) {
        if (option.name == "help") {
            std::printf("Usage: gantry status [OPTION]...\n\n%s", options_help(kOptions).c_str());
            return 0;
        }
        if (option.name == "qmp") sockets.push_back(option.value);
        if (option.name == "json") as_json = true;
    }
    bool asked_by_name = !sockets.empty();
    if (!asked_by_name) sockets = find_control_sockets();
    json::array daemons;
    for (const std::string& socket : sockets) {
        auto daemon = ask(socket);
        if (daemon) {
            daemons.push_back(std::move(*daemon));
        } else if (asked_by_name) {
            std::fprintf(stderr, "gantry status: %s\n", daemon.error().message().c_str());
            return 1;
        }
    }
    if (as_json) {
        std::puts(schema::to_json(daemons, schema::JsonLayout::kPretty).c_str());
        return 0;
    }
    if (daemons.empty()) {
        std::printf("No running daemon has a control socket in %s\n", control_directory().c_str());
        return 0;
    }
    for (const json::value& daemon : daemons) print_daemon(daemon.get_object());
    return 0;
}

}  // namespace gantry::cli
