// Socket addresses.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kSocketAddressTypeValues[] = {
    {"inet", "TCP"},
    {"unix", "a unix socket"},
    {"vsock", "a socket between a virtual machine and its host"},
    {"fd", "a socket that is open already"},
};
constinit const Type kSocketAddressType =
    enum_type("SocketAddressType", "The kinds of socket addresses.", kSocketAddressTypeValues);

constexpr Member kInetMembers[] = {
    required("host", kStr, "name or address; empty: all addresses"),
    required("port", kStr, "port number or name of a service; 0: one that is free"),
    optional("numeric", kBool, "off", "host and port are numbers: no name is looked up"),
    optional("to", kUint16, "", "the last port to try, when the one given is taken"),
    optional("ipv4", kBool, "", "take IPv4 addresses, or do not"),
    optional("ipv6", kBool, "", "take IPv6 addresses, or do not"),
    optional("keep-alive", kBool, "on", "probe whether a silent peer is still there"),
    optional("keep-alive-count", kUint32, "the system's", "probes without an answer after which the peer is gone"),
    optional("keep-alive-idle", kUint32, "the system's", "seconds of silence before the first probe"),
    optional("keep-alive-interval", kUint32, "the system's", "seconds between probes"),
};
constexpr Absent kInetAbsent[] = {
    {"mptcp", "not in this build: multipath TCP is not built"},
};
constinit const Type kInetSocketAddress = struct_type("InetSocketAddress", "A TCP address.", kInetMembers, kInetAbsent);

constexpr Member kUnixMembers[] = {
    required("path", kStr, "the file; at most 107 bytes"),
    optional("abstract", kBool, "off", "the name lives in the kernel's abstract name space, not in a file system"),
    optional("mode", kStr, "what the umask leaves", "permissions of the file that is listened on, octal"),
    optional("group", kStr, "", "group of the file that is listened on, by name or number"),
    optional("tight", kBool, "on", "an abstract name ends with its last byte instead of being filled with zeroes"),
};
constinit const Type kUnixSocketAddress = struct_type("UnixSocketAddress", "A unix socket.", kUnixMembers);

constexpr Member kVsockMembers[] = {
    required("cid", kStr, "context number of the machine: 2 is the host, 1 this machine; -1: any, to listen"),
    required("port", kStr, "port number; -1: one that is free, to listen"),
};
constinit const Type kVsockSocketAddress = struct_type("VsockSocketAddress", "A vsock address.", kVsockMembers);

constexpr Member kFdMembers[] = {
    required("str", kStr, "number of an inherited descriptor, or the name of one that was passed"),
};
constinit const Type kFdSocketAddress = struct_type("FdSocketAddress", "A socket that is open already.", kFdMembers);

constexpr Member kAddressMembers[] = {
    required("type", kSocketAddressType, "the kind of address"),
};
constexpr Variant kAddressVariants[] = {
    {"inet", &kInetSocketAddress},
    {"unix", &kUnixSocketAddress},
    {"vsock", &kVsockSocketAddress},
    {"fd", &kFdSocketAddress},
};

}  // namespace

constinit const Type kSocketAddress =
    union_type("SocketAddress", "Where to listen or to connect to.", kAddressMembers, "type", kAddressVariants);
constinit const Type kSocketAddressLegacy = folding(
    union_type("SocketAddressLegacy", "Where to listen or to connect to.", kAddressMembers, "type", kAddressVariants),
    Fold::kLegacy, "data");

namespace {
constexpr const Type* kTypes[] = {
    &kSocketAddressType, &kInetSocketAddress, &kUnixSocketAddress,   &kVsockSocketAddress,
    &kFdSocketAddress,   &kSocketAddress,     &kSocketAddressLegacy,
};
}  // namespace

constinit const Module kSocketsModule = {.types = kTypes};

}  // namespace gantry::schema
