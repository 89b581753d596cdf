// The protocol about itself: negotiation, version, introspection, quit.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

// --- negotiation and version

constexpr EnumValue kCapabilityValues[] = {{"oob", "commands may be executed out of band"}};
constinit const Type kCapability = enum_type("QMPCapability", "What a client may switch on.", kCapabilityValues);
constinit const Type kCapabilityList = array_of(kCapability);
constexpr Member kCapabilitiesMembers[] = {
    optional("enable", kCapabilityList, "none", "what to switch on"),
};
constinit const Type kCapabilitiesArguments = struct_type("", "", kCapabilitiesMembers);

constexpr Member kTripleMembers[] = {
    required("major", kInt, "first number"),
    required("minor", kInt, "second number"),
    required("micro", kInt, "third number"),
};
constinit const Type kVersionTriple = struct_type("VersionTriple", "A version.", kTripleMembers);
constexpr Member kVersionMembers[] = {
    required("qemu", kVersionTriple, "the version of the reference that this program behaves like"),
    required("package", kStr, "this program and its version"),
};
constinit const Type kVersionInfo = struct_type("VersionInfo", "Who answers.", kVersionMembers);

constexpr Member kCommandInfoMembers[] = {required("name", kStr, "the command")};
constinit const Type kCommandInfo = struct_type("CommandInfo", "A command.", kCommandInfoMembers);
constinit const Type kCommandInfoList = array_of(kCommandInfo);
constexpr Member kEventInfoMembers[] = {required("name", kStr, "the event")};
constinit const Type kEventInfo = struct_type("EventInfo", "An event.", kEventInfoMembers);
constinit const Type kEventInfoList = array_of(kEventInfo);

// --- introspection

constexpr EnumValue kMetaTypeValues[] = {
    {"builtin", "a scalar"},
    {"enum", "one of several words"},
    {"array", "a list"},
    {"object", "members by name"},
    {"alternate", "one of several types, told apart by what the JSON looks like"},
    {"command", "a command"},
    {"event", "an event"},
};
constinit const Type kMetaType = enum_type("SchemaMetaType", "What an entry describes.", kMetaTypeValues);

constexpr EnumValue kJsonTypeValues[] = {
    {"string"}, {"number"}, {"int"}, {"boolean"}, {"null"}, {"object"}, {"array"}, {"value"},
};
constinit const Type kJsonType = enum_type("JSONType", "What the JSON looks like.", kJsonTypeValues);
constexpr Member kBuiltinMembers[] = {required("json-type", kJsonType, "what the JSON looks like")};
constinit const Type kSchemaBuiltin = struct_type("SchemaInfoBuiltin", "A scalar.", kBuiltinMembers);

constexpr Member kEnumMemberMembers[] = {
    required("name", kStr, "the word"),
    optional("features", kStrList, "", "what clients should know about it"),
};
constinit const Type kEnumMember = struct_type("SchemaInfoEnumMember", "A value.", kEnumMemberMembers);
constinit const Type kEnumMemberList = array_of(kEnumMember);
constexpr Member deprecated(Member member) {
    member.features = kDeprecated;
    return member;
}
constexpr Member kEnumMembers[] = {
    required("members", kEnumMemberList, "the values"),
    deprecated(required("values", kStrList, "their names alone")),
};
constinit const Type kSchemaEnum = struct_type("SchemaInfoEnum", "One of several words.", kEnumMembers);

constexpr Member kArrayMembers[] = {required("element-type", kStr, "the entry of its elements")};
constinit const Type kSchemaArray = struct_type("SchemaInfoArray", "A list.", kArrayMembers);

constexpr Member kObjectMemberMembers[] = {
    required("name", kStr, "the member"),
    required("type", kStr, "the entry of its type"),
    optional("default", kAny, "", "there when it is optional"),
    optional("features", kStrList, "", "what clients should know about it"),
};
constinit const Type kObjectMember = struct_type("SchemaInfoObjectMember", "A member.", kObjectMemberMembers);
constinit const Type kObjectMemberList = array_of(kObjectMember);
constexpr Member kObjectVariantMembers[] = {
    required("case", kStr, "a value of the tag"),
    required("type", kStr, "the entry of the members it adds"),
};
constinit const Type kObjectVariant = struct_type("SchemaInfoObjectVariant", "A case.", kObjectVariantMembers);
constinit const Type kObjectVariantList = array_of(kObjectVariant);
constexpr Member kObjectMembers[] = {
    required("members", kObjectMemberList, "the members"),
    optional("tag", kStr, "", "the member that selects a case"),
    optional("variants", kObjectVariantList, "", "the cases"),
};
constinit const Type kSchemaObject = struct_type("SchemaInfoObject", "Members by name.", kObjectMembers);

constexpr Member kAlternateMemberMembers[] = {required("type", kStr, "the entry of the type")};
constinit const Type kAlternateMember = struct_type("SchemaInfoAlternateMember", "A branch.", kAlternateMemberMembers);
constinit const Type kAlternateMemberList = array_of(kAlternateMember);
constexpr Member kAlternateMembers[] = {required("members", kAlternateMemberList, "the branches")};
constinit const Type kSchemaAlternate = struct_type("SchemaInfoAlternate", "One of several types.", kAlternateMembers);

constexpr Member kCommandMembers[] = {
    required("arg-type", kStr, "the entry of its arguments"),
    required("ret-type", kStr, "the entry of its result"),
    optional("allow-oob", kBool, "off", "it may be executed out of band"),
};
constinit const Type kSchemaCommand = struct_type("SchemaInfoCommand", "A command.", kCommandMembers);
constexpr Member kEventMembers[] = {required("arg-type", kStr, "the entry of its data")};
constinit const Type kSchemaEvent = struct_type("SchemaInfoEvent", "An event.", kEventMembers);

constexpr Member kSchemaMembers[] = {
    required("name", kStr, "the name of a command, an event or a builtin; for other types a number"),
    required("meta-type", kMetaType, "what the entry describes"),
    optional("features", kStrList, "", "what clients should know about it"),
};
constexpr Variant kSchemaVariants[] = {
    {"builtin", &kSchemaBuiltin}, {"enum", &kSchemaEnum},           {"array", &kSchemaArray},
    {"object", &kSchemaObject},   {"alternate", &kSchemaAlternate}, {"command", &kSchemaCommand},
    {"event", &kSchemaEvent},
};
constinit const Type kSchemaInfo =
    union_type("SchemaInfo", "An entry of the schema.", kSchemaMembers, "meta-type", kSchemaVariants);
constinit const Type kSchemaInfoList = array_of(kSchemaInfo);

// --- the rest

constexpr Command kCommands[] = {
    {"qmp_capabilities", &kCapabilitiesArguments, nullptr, "Ends the negotiation that every connection begins with."},
    {"query-version", nullptr, &kVersionInfo, "Tells who answers."},
    {"query-commands", nullptr, &kCommandInfoList, "Lists the commands."},
    {"query-events", nullptr, &kEventInfoList, "Lists the events.", kDeprecated},
    {"query-qmp-schema", nullptr, &kSchemaInfoList, "Describes everything that is served."},
    {"quit", nullptr, nullptr, "Ends the program."},
};

constexpr const Type* kTypes[] = {
    &kCapability,      &kVersionTriple, &kVersionInfo,   &kCommandInfo,  &kEventInfo,
    &kMetaType,        &kJsonType,      &kSchemaBuiltin, &kEnumMember,   &kSchemaEnum,
    &kSchemaArray,     &kObjectMember,  &kObjectVariant, &kSchemaObject, &kAlternateMember,
    &kSchemaAlternate, &kSchemaCommand, &kSchemaEvent,   &kSchemaInfo,
};

}  // namespace

constinit const Module kControlModule = {.types = kTypes, .commands = kCommands};

}  // namespace gantry::schema
