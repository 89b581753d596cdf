// Objects.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kObjectTypeValues[] = {
    {"iothread", "a thread with an I/O loop"},
    {"secret", "a passphrase or a key"},
    {"secret_keyring", "a passphrase or a key, from the kernel's keyring"},
};
// Serving an object type moves its line up, with its properties below.
constexpr std::string_view kNoTls = "not in this build: TLS is not built";
constexpr std::string_view kNoMachine = "not in this build: it belongs to a virtual machine";
constexpr Absent kAbsentObjects[] = {
    {"authz-list", kNoTls},
    {"authz-list-file", kNoTls},
    {"authz-listfile", kNoTls},
    {"authz-pam", kNoTls},
    {"authz-simple", kNoTls},
    {"can-bus", kNoMachine},
    {"can-host-socketcan", kNoMachine},
    {"colo-compare", kNoMachine},
    {"cryptodev-backend", kNoMachine},
    {"cryptodev-backend-builtin", kNoMachine},
    {"cryptodev-backend-lkcf", kNoMachine},
    {"cryptodev-vhost-user", kNoMachine},
    {"dbus-vmstate", kNoMachine},
    {"filter-buffer", kNoMachine},
    {"filter-dump", kNoMachine},
    {"filter-mirror", kNoMachine},
    {"filter-redirector", kNoMachine},
    {"filter-replay", kNoMachine},
    {"filter-rewriter", kNoMachine},
    {"input-barrier", kNoMachine},
    {"input-linux", kNoMachine},
    {"main-loop", "not in this build: the main loop has no properties"},
    {"memory-backend-epc", kNoMachine},
    {"memory-backend-file", kNoMachine},
    {"memory-backend-memfd", kNoMachine},
    {"memory-backend-ram", kNoMachine},
    {"memory-backend-shm", kNoMachine},
    {"pef-guest", kNoMachine},
    {"pr-manager-helper", "not in this build: SCSI persistent reservations are not built"},
    {"qtest", kNoMachine},
    {"rng-builtin", kNoMachine},
    {"rng-egd", kNoMachine},
    {"rng-random", kNoMachine},
    {"s390-pv-guest", kNoMachine},
    {"sev-guest", kNoMachine},
    {"thread-context", kNoMachine},
    {"throttle-group", "not in this build: throttling is not built"},
    {"tls-cipher-suites", kNoTls},
    {"tls-creds-anon", kNoTls},
    {"tls-creds-psk", kNoTls},
    {"tls-creds-x509", kNoTls},
    {"x-remote-object", kNoMachine},
    {"x-vfio-user-server", kNoMachine},
};

constexpr Member kEventLoopMembers[] = {
    optional("aio-max-batch", kInt, "0", "requests submitted together at most; 0: decided by the program"),
    optional("thread-pool-min", kInt, "0", "threads for blocking calls that are kept ready"),
    optional("thread-pool-max", kInt, "64", "threads for blocking calls at most"),
};
constinit const Type kEventLoopProperties =
    struct_type("EventLoopBaseProperties", "What all loops have.", kEventLoopMembers);

constexpr Member kIothreadMembers[] = {
    optional("poll-max-ns", kInt, "32768", "how long the loop looks for work before it sleeps; 0: not at all"),
    optional("poll-grow", kInt, "0",
             "factor by which that time grows when it was too short; 0: decided by the program"),
    optional("poll-shrink", kInt, "0", "divisor by which it shrinks when it was too long; 0: decided by the program"),
};
constexpr Absent kIothreadAbsent[] = {
    {"poll-weight", "not in this build: polling has no weights"},
};
constinit const Type kIothreadProperties = derived_type("IothreadProperties", "A thread with an I/O loop.",
                                                        kEventLoopProperties, kIothreadMembers, kIothreadAbsent);

// Both kinds of secrets.
constexpr EnumValue kSecretFormatValues[] = {
    {"raw", "the bytes as they are"},
    {"base64", "base64"},
};
constinit const Type kSecretFormat =
    enum_type("QCryptoSecretFormat", "How the bytes of a secret are written.", kSecretFormatValues);
constexpr Member kSecretCommonMembers[] = {
    optional("format", kSecretFormat, "raw", "how the bytes are written"),
    optional("keyid", kStr, "not encrypted", "id of the secret that holds the AES-256 key of this one"),
    optional("iv", kStr, "", "initialisation vector that goes with keyid, base64"),
};
constexpr Absent kSecretAbsent[] = {
    {"loaded", "a secret is there as soon as it is made"},
};
constinit const Type kSecretCommon =
    struct_type("SecretCommonProperties", "What all secrets have.", kSecretCommonMembers, kSecretAbsent);
constexpr Member kSecretMembers[] = {
    optional("data", kStr, "", "the secret itself; other users of this machine can read a command line"),
    optional("file", kStr, "", "file that holds it, or credential:ID for a credential of the service manager"),
};
constinit const Type kSecretProperties =
    derived_type("SecretProperties", "A passphrase or a key.", kSecretCommon, kSecretMembers);
constexpr Member kSecretKeyringMembers[] = {
    required("serial", kInt32, "number of the key"),
};
constinit const Type kSecretKeyringProperties =
    derived_type("SecretKeyringProperties", "A passphrase or a key, from the kernel's keyring.", kSecretCommon,
                 kSecretKeyringMembers);

}  // namespace

constinit const Type kObjectType = enum_type("ObjectType", "The kinds of objects.", kObjectTypeValues, kAbsentObjects);

namespace {

constexpr Member kObjectMembers[] = {
    required("qom-type", kObjectType, "what kind of object"),
    required("id", kStr, "its name"),
};
constexpr Variant kObjectVariants[] = {
    {"iothread", &kIothreadProperties},
    {"secret", &kSecretProperties},
    {"secret_keyring", &kSecretKeyringProperties},
};
/// Also with the old {"qom-type", "id", "props": {...}}.
constinit const Type kObjectOptions = folding(
    union_type("ObjectOptions", "An object.", kObjectMembers, "qom-type", kObjectVariants), Fold::kMerge, "props");

constexpr Member kIdMembers[] = {required("id", kStr, "the object")};
constinit const Type kIdArguments = struct_type("", "", kIdMembers);

constexpr Member kIothreadInfoMembers[] = {
    required("id", kStr, "its name"),
    required("thread-id", kInt, "the number the kernel gave it"),
    required("poll-max-ns", kInt, "how long the loop looks for work before it sleeps"),
    required("poll-grow", kInt, "factor by which that time grows"),
    required("poll-shrink", kInt, "divisor by which it shrinks"),
    required("aio-max-batch", kInt, "requests submitted together at most"),
};
constinit const Type kIothreadInfo = struct_type("IOThreadInfo", "An iothread.", kIothreadInfoMembers);
constinit const Type kIothreadInfoList = array_of(kIothreadInfo);

constexpr Command kCommands[] = {
    {"object-add", &kObjectOptions, nullptr, "Makes an object."},
    {"object-del", &kIdArguments, nullptr, "Removes an object that nobody uses."},
    {"query-iothreads", nullptr, &kIothreadInfoList, "Lists the iothreads."},
};

constexpr const Type* kTypes[] = {
    &kObjectType,       &kEventLoopProperties,     &kIothreadProperties, &kSecretFormat, &kSecretCommon,
    &kSecretProperties, &kSecretKeyringProperties, &kObjectOptions,      &kIothreadInfo,
};

}  // namespace

constinit const Module kQomModule = {.types = kTypes, .commands = kCommands};

}  // namespace gantry::schema
