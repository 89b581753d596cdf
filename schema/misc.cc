// Monitors and their character devices (command line only), and what health checks ask.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

// --- --chardev

constexpr EnumValue kBackendValues[] = {
    {"socket", "a unix or TCP socket"},
    {"stdio", "standard input and output"},
};
constexpr std::string_view kNoBackend =
    "not in this build: character devices only carry the monitor, over socket or stdio";
constexpr Absent kAbsentBackends[] = {
    {"file", kNoBackend},     {"memory", kNoBackend}, {"mux", kNoBackend}, {"null", kNoBackend},
    {"parallel", kNoBackend}, {"pipe", kNoBackend},   {"pty", kNoBackend}, {"ringbuf", kNoBackend},
    {"serial", kNoBackend},   {"udp", kNoBackend},
};
constinit const Type kChardevBackend =
    enum_type("ChardevBackendKind", "The kinds of character devices.", kBackendValues, kAbsentBackends);

constexpr Member kSocketMembers[] = {
    optional("path", kStr, "", "a unix socket; or host and port, or fd"),
    optional("host", kStr, "", "name or address to listen on"),
    optional("port", kStr, "", "port number or name of a service"),
    optional("ipv4", kBool, "", "take IPv4 addresses, or do not"),
    optional("ipv6", kBool, "", "take IPv6 addresses, or do not"),
    optional("fd", kStr, "", "a listening socket that was inherited"),
    optional("server", kBool, "off", "listen instead of connecting"),
    optional("wait", kBool, "on", "do not start before a client has connected"),
};
constexpr std::string_view kNoTls = "not in this build: monitors do not speak TLS";
constexpr std::string_view kNoTerminal = "not in this build: the monitor speaks plain QMP";
constexpr std::string_view kPlainSocket = "not in this build: monitors take a path, host and port, or fd";
constexpr Absent kSocketAbsent[] = {
    {"abstract", kPlainSocket},
    {"tight", kPlainSocket},
    {"to", kPlainSocket},
    {"nodelay", "not in this build: connections take the system's setting"},
    {"tls-creds", kNoTls},
    {"tls-authz", kNoTls},
    {"telnet", kNoTerminal},
    {"tn3270", kNoTerminal},
    {"websocket", kNoTerminal},
    {"reconnect", "not in this build: monitors only listen"},
    {"reconnect-ms", "not in this build: monitors only listen"},
};
constinit const Type kChardevSocket = struct_type("ChardevSocket", "A socket.", kSocketMembers, kSocketAbsent);

constexpr Absent kStdioAbsent[] = {
    {"signal", "not in this build: the terminal keeps its settings"},
};
constinit const Type kChardevStdio = struct_type("ChardevStdio", "Standard input and output.", {}, kStdioAbsent);

constexpr Member kChardevMembers[] = {
    required("backend", kChardevBackend, "what kind of character device"),
    required("id", kStr, "its name"),
};
constexpr Absent kChardevAbsent[] = {
    {"logfile", "not in this build: character devices keep no log"},
    {"logappend", "not in this build: character devices keep no log"},
    {"mux", "not in this build: a character device has one user"},
};
constexpr Variant kChardevVariants[] = {{"socket", &kChardevSocket}, {"stdio", &kChardevStdio}};
constinit const Type kChardevOptions =
    union_type("ChardevOptions", "A character device.", kChardevMembers, "backend", kChardevVariants, kChardevAbsent);

// --- --monitor

constexpr EnumValue kMonitorModeValues[] = {
    {"readline", "commands for people; not offered by this program"},
    {"control", "QMP"},
};
constinit const Type kMonitorMode = enum_type("MonitorMode", "What a monitor speaks.", kMonitorModeValues);
constexpr Member kMonitorMembers[] = {
    optional("id", kStr, "", "its name"),
    optional("mode", kMonitorMode, "control", "what it speaks"),
    optional("pretty", kBool, "off", "replies over several lines"),
    required("chardev", kStr, "the character device it uses"),
};
constinit const Type kMonitorOptions = struct_type("MonitorOptions", "A control connection.", kMonitorMembers);

// --- query-status

constexpr EnumValue kRunStateValues[] = {{"running", "always"}};
constinit const Type kRunState = enum_type("RunState", "State of the program.", kRunStateValues);
constexpr Member kStatusMembers[] = {
    required("running", kBool, "always true"),
    required("singlestep", kBool, "always false"),
    required("status", kRunState, "always running"),
};
constinit const Type kStatusInfo = struct_type("StatusInfo", "State of the program.", kStatusMembers);

constexpr Command kCommands[] = {
    {"query-status", nullptr, &kStatusInfo, "Answers health checks that ask whether a machine runs."},
};

constexpr const Type* kTypes[] = {
    &kChardevBackend, &kChardevSocket,  &kChardevStdio, &kChardevOptions,
    &kMonitorMode,    &kMonitorOptions, &kRunState,     &kStatusInfo,
};

}  // namespace

constinit const Module kMiscModule = {.types = kTypes, .commands = kCommands};

}  // namespace gantry::schema
