// Objects.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kObjectTypeValues[] = {
    {"authz-list", "lets in whom a list of rules names"},
    {"authz-list-file", "the same with the rules in a file"},
    {"authz-listfile", "another spelling of authz-list-file"},
#ifdef GANTRY_PAM
    {"authz-pam", "lets in whom a PAM service accepts"},
#endif
    {"authz-simple", "lets in one client"},
    {"iothread", "a thread with an I/O loop"},
    {"secret", "a passphrase or a key"},
    {"secret_keyring", "a passphrase or a key, from the kernel's keyring"},
    {"tls-creds-anon", "TLS without any proof of who is who"},
    {"tls-creds-psk", "TLS with keys that both sides know"},
    {"tls-creds-x509", "TLS with certificates"},
};
// Serving an object type moves its line up, with its properties below.
constexpr std::string_view kNoMachine = "not in this build: it belongs to a virtual machine";
constexpr Absent kAbsentObjects[] = {
#ifndef GANTRY_PAM
    {"authz-pam", "not in this build: PAM was not there when it was built"},
#endif
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
    {"tls-cipher-suites", "not in this build: it belongs to a virtual machine's firmware"},
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

// TLS credentials.
constexpr EnumValue kEndpointValues[] = {
    {"client", "for connections that we open"},
    {"server", "for connections that others open"},
};
constinit const Type kEndpoint =
    enum_type("QCryptoTLSCredsEndpoint", "Which end of connections credentials are for.", kEndpointValues);
constexpr Member kTlsCommonMembers[] = {
    optional("verify-peer", kBool, "on", "the certificate of the other side is demanded and verified"),
    optional("dir", kStr, "", "directory of the files"),
    optional("endpoint", kEndpoint, "client", "which end of connections they are for"),
    optional("priority", kStr, "TLS 1.2 and later, AES-128-GCM first",
             "versions and ciphers, as a GnuTLS priority string"),
};
constexpr Absent kTlsAbsent[] = {
    {"loaded", "credentials are there as soon as they are made; tls-creds-reload reads the files again"},
};
constinit const Type kTlsCommon =
    struct_type("TlsCredsProperties", "What all TLS credentials have.", kTlsCommonMembers, kTlsAbsent);
constexpr Member kTlsAnonMembers[] = {
    optional("dh-params", kStr, "dh-params.pem in dir, if it is there", "file of Diffie-Hellman parameters"),
};
constinit const Type kTlsAnon =
    derived_type("TlsCredsAnonProperties", "TLS without any proof of who is who.", kTlsCommon, kTlsAnonMembers);
constexpr Member kTlsPskMembers[] = {
    optional("username", kStr, "qemu", "a client's identity, whose key is taken from the file"),
    optional("keys", kStr, "keys.psk in dir", "file of the keys, a line IDENTITY:HEXKEY for each"),
    optional("dh-params", kStr, "dh-params.pem in dir, if it is there", "file of Diffie-Hellman parameters"),
};
constinit const Type kTlsPsk =
    derived_type("TlsCredsPskProperties", "TLS with keys that both sides know.", kTlsCommon, kTlsPskMembers);
constexpr Member kTlsX509Members[] = {
    optional("sanity-check", kBool, "on", "our own certificates are looked at before they are used"),
    optional("passwordid", kStr, "", "id of the secret that decrypts the private key"),
    optional("ca-cert", kStr, "ca-cert.pem in dir", "file of the certificate authorities that are trusted"),
    optional("ca-crl", kStr, "ca-crl.pem in dir, if it is there", "file of revoked certificates"),
    optional("cert", kStr, "server-cert.pem or client-cert.pem in dir", "file of our certificate"),
    optional("key", kStr, "server-key.pem or client-key.pem in dir", "file of its private key"),
    optional("dh-params", kStr, "dh-params.pem in dir, if it is there", "file of Diffie-Hellman parameters"),
};
constinit const Type kTlsX509 =
    derived_type("TlsCredsX509Properties", "TLS with certificates.", kTlsCommon, kTlsX509Members);

// Authorization.
constexpr EnumValue kAuthzPolicyValues[] = {
    {"deny", "no"},
    {"allow", "yes"},
};
constinit const Type kAuthzPolicy = enum_type("QAuthZListPolicy", "What a rule says.", kAuthzPolicyValues);
constexpr EnumValue kAuthzFormatValues[] = {
    {"exact", "the very name"},
    {"glob", "a pattern: * stands for anything, ? for one character"},
};
constinit const Type kAuthzFormat = enum_type("QAuthZListFormat", "How a rule is compared.", kAuthzFormatValues);
constexpr Member kAuthzRuleMembers[] = {
    required("match", kStr, "distinguished name of a client's certificate, or its PSK identity"),
    required("policy", kAuthzPolicy, "what becomes of such a client"),
    optional("format", kAuthzFormat, "exact", "how match is meant"),
};
constinit const Type kAuthzRule = struct_type("QAuthZListRule", "A rule.", kAuthzRuleMembers);
constinit const Type kAuthzRules = array_of(kAuthzRule);
constexpr Member kAuthzListMembers[] = {
    optional("policy", kAuthzPolicy, "deny", "what becomes of clients that no rule is about"),
    optional("rules", kAuthzRules, "none", "the first one that fits a client decides"),
};
constinit const Type kAuthzList =
    struct_type("AuthZListProperties", "Lets in whom a list of rules names.", kAuthzListMembers);
constexpr Member kAuthzFileMembers[] = {
    required("filename", kStr, "JSON file with the members of authz-list"),
    optional("refresh", kBool, "on", "the file is read again when it has changed; while it is broken nobody is let in"),
};
constinit const Type kAuthzFile =
    struct_type("AuthZListFileProperties", "Lets in whom rules in a file name.", kAuthzFileMembers);
#ifdef GANTRY_PAM
constexpr Member kAuthzPamMembers[] = {
    required("service", kStr, "the PAM service whose account stage is asked"),
};
constinit const Type kAuthzPam =
    struct_type("AuthZPAMProperties", "Lets in whom a PAM service accepts.", kAuthzPamMembers);
#endif
constexpr Member kAuthzSimpleMembers[] = {
    required("identity", kStr, "distinguished name of the client's certificate, or its PSK identity"),
};
constinit const Type kAuthzSimple = struct_type("AuthZSimpleProperties", "Lets in one client.", kAuthzSimpleMembers);

}  // namespace

constinit const Type kObjectType = enum_type("ObjectType", "The kinds of objects.", kObjectTypeValues, kAbsentObjects);

namespace {

constexpr Member kObjectMembers[] = {
    required("qom-type", kObjectType, "what kind of object"),
    required("id", kStr, "its name"),
};
constexpr Variant kObjectVariants[] = {
    {"authz-list", &kAuthzList},     {"authz-list-file", &kAuthzFile},
    {"authz-listfile", &kAuthzFile},
#ifdef GANTRY_PAM
    {"authz-pam", &kAuthzPam},
#endif
    {"authz-simple", &kAuthzSimple}, {"iothread", &kIothreadProperties},
    {"secret", &kSecretProperties},  {"secret_keyring", &kSecretKeyringProperties},
    {"tls-creds-anon", &kTlsAnon},   {"tls-creds-psk", &kTlsPsk},
    {"tls-creds-x509", &kTlsX509},
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

constexpr Member kReloadMembers[] = {
    optional("id", kStr, "all of them", "the credentials"),
};
constinit const Type kReloadArguments = struct_type("", "", kReloadMembers);

constexpr Command kCommands[] = {
    {"object-add", &kObjectOptions, nullptr, "Makes an object."},
    {"object-del", &kIdArguments, nullptr, "Removes an object that nobody uses."},
    {"query-iothreads", nullptr, &kIothreadInfoList, "Lists the iothreads."},
    {"tls-creds-reload", &kReloadArguments, nullptr,
     "Reads the files of TLS credentials again, for connections to come."},
};

constexpr const Type* kTypes[] = {
    &kObjectType,
    &kEventLoopProperties,
    &kIothreadProperties,
    &kSecretFormat,
    &kSecretCommon,
    &kSecretProperties,
    &kSecretKeyringProperties,
    &kEndpoint,
    &kTlsCommon,
    &kTlsAnon,
    &kTlsPsk,
    &kTlsX509,
    &kAuthzPolicy,
    &kAuthzFormat,
    &kAuthzRule,
    &kAuthzList,
    &kAuthzFile,
#ifdef GANTRY_PAM
    &kAuthzPam,
#endif
    &kAuthzSimple,
    &kObjectOptions,
    &kIothreadInfo,
};

}  // namespace

constinit const Module kQomModule = {.types = kTypes, .commands = kCommands};

}  // namespace gantry::schema
