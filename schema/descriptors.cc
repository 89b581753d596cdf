// Descriptors passed over a monitor's unix socket.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr Member kNameMembers[] = {required("fdname", kStr, "its name on this monitor; does not begin with a digit")};
constinit const Type kNameArguments = struct_type("", "", kNameMembers);

constexpr Member kAddMembers[] = {
    optional("fdset-id", kInt, "the smallest that is free", "the set"),
    optional("opaque", kStr, "", "a note for query-fdsets"),
};
constinit const Type kAddArguments = struct_type("", "", kAddMembers);
constexpr Member kAddResultMembers[] = {
    required("fdset-id", kInt, "the set"),
    required("fd", kInt, "the descriptor's number in this process"),
};
constinit const Type kAddResult = struct_type("AddfdInfo", "Where a passed descriptor is.", kAddResultMembers);

constexpr Member kRemoveMembers[] = {
    required("fdset-id", kInt, "the set"),
    optional("fd", kInt, "all of the set", "the descriptor's number"),
};
constinit const Type kRemoveArguments = struct_type("", "", kRemoveMembers);

constexpr Member kSetFdMembers[] = {
    required("fd", kInt, "its number in this process"),
    optional("opaque", kStr, "", "the note"),
};
constinit const Type kSetFd = struct_type("FdsetFdInfo", "A descriptor of a set.", kSetFdMembers);
constinit const Type kSetFdList = array_of(kSetFd);
constexpr Member kSetMembers[] = {
    required("fdset-id", kInt, "its number: /dev/fdset/NUMBER is its file name"),
    required("fds", kSetFdList, "what is in it; empty: removed, and still used by a node"),
};
constinit const Type kSet = struct_type("FdsetInfo", "A set of descriptors.", kSetMembers);
constinit const Type kSetList = array_of(kSet);

constexpr Command kCommands[] = {
    {"getfd", &kNameArguments, nullptr, "Takes the descriptor that came with the command, under a name."},
    {"closefd", &kNameArguments, nullptr, "Closes a descriptor by its name on this monitor."},
    {"add-fd", &kAddArguments, &kAddResult, "Takes the descriptor that came with the command into a set."},
    {"remove-fd", &kRemoveArguments, nullptr, "Removes a descriptor, or all, from a set."},
    {"query-fdsets", nullptr, &kSetList, "Lists the sets of descriptors."},
};

constexpr const Type* kTypes[] = {&kAddResult, &kSetFd, &kSet};

}  // namespace

constinit const Module kDescriptorsModule = {kTypes, kCommands};

}  // namespace gantry::schema
