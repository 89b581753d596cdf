// Socket addresses.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kSocketAddressTypeValues[] = {
    {"inet", "TCP"},
    {"unix", "a unix socket"},
    {"fd", "a socket that is open already"},
};
constexpr Absent kAbsentAddressTypes[] = {
    {"vsock", "not in this build: vsock is not built; use inet, unix or fd"},
};
constinit const Type kSocketAddressType =
    enum_type("SocketAddressType", "The kinds of socket addresses.", kSocketAddressTypeValues, kAbsentAddressTypes);

constexpr Member kInetMembers[] = {
    required("host", kStr, "name or address; empty: all addresses"),
    required("port", kStr, "port number or name of a service; 0: one that is free"),
    optional("to", kUint16, "", "the last port to try, when the one given is taken"),
    optional("ipv4", kBool, "", "take IPv4 addresses, or do not"),
    optional("ipv6", kBool, "", "take IPv6 addresses, or do not"),
};
constexpr Absent kInetAbsent[] = {
    {"keep-alive", "not in this build: connections take the system's setting"},
    {"mptcp", "not in this build: multipath TCP is not built"},
    {"numeric", "not in this build: host and port always go through the resolver, which takes numbers as they are"},
};
constinit const Type kInetSocketAddress = struct_type("InetSocketAddress", "A TCP address.", kInetMembers, kInetAbsent);

constexpr Member kUnixMembers[] = {
    required("path", kStr, "the file; at most 107 bytes"),
    optional("abstract", kBool, "off", "the name lives in the kernel's abstract name space, not in a file system"),
    optional("tight", kBool, "on", "an abstract name ends with its last byte instead of being filled with zeroes"),
};
constinit const Type kUnixSocketAddress = struct_type("UnixSocketAddress", "A unix socket.", kUnixMembers);

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
    &kSocketAddressType, &kInetSocketAddress, &kUnixSocketAddress,
    &kFdSocketAddress,   &kSocketAddress,     &kSocketAddressLegacy,
};
}  // namespace

constinit const Module kSocketsModule = {.types = kTypes};

}  // namespace gantry::schema
