#include "schema/introspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <string>

#include "schema/schema.h"

namespace gantry::schema {

namespace {

/// Walks the types that commands and events reach and gives each a number, in the order they are met.
class Describer {
  public:
    json::array run() {
        entries_.push_back({{"name", kEmptyName}, {"meta-type", "object"}, {"members", json::array()}});
        json::array out;
        for (const Command* command : commands()) out.push_back(describe(*command));
        for (const Event* event : events()) out.push_back(describe(*event));
        while (!pending_.empty()) {
            const Pending next = pending_.front();
            pending_.pop_front();
            entries_.push_back(describe(next));
        }
        for (json::value& entry : entries_) out.push_back(std::move(entry));
        return out;
    }

  private:
    static constexpr std::string_view kEmptyName = "0";

    struct Pending {
        const Type* type;
        std::string name;
        std::string_view box;  // not empty: an object whose single member of this name holds `type`
    };

    static json::array strings(std::span<const std::string_view> texts) {
        json::array out;
        for (std::string_view text : texts) out.emplace_back(text);
        return out;
    }
    static void add_features(json::object& entry, std::span<const std::string_view> features) {
        if (!features.empty()) entry["features"] = strings(features);
    }
    static bool is_empty(const Type& type) {
        return type.kind == Kind::kObject && type.members.empty() && type.tag.empty() &&
               (!type.base || is_empty(*type.base));
    }

    json::object describe(const Command& command) {
        json::object entry{{"name", command.name}, {"meta-type", "command"}};
        entry["arg-type"] = name_of(command.arguments);
        entry["ret-type"] = name_of(command.returns);
        if (command.allow_oob) entry["allow-oob"] = true;
        add_features(entry, command.features);
        return entry;
    }
    json::object describe(const Event& event) {
        json::object entry{{"name", event.name}, {"meta-type", "event"}, {"arg-type", name_of(event.data)}};
        add_features(entry, event.features);
        return entry;
    }

    std::string name_of(const Type* type) { return type ? name_of(*type) : std::string(kEmptyName); }

    /// The name clients see; queues the type's entry when it is met for the first time.
    std::string name_of(const Type& type) {
        switch (type.kind) {
            case Kind::kInteger:
            case Kind::kSize:
                return builtin("int", "int");
            case Kind::kString:
                return builtin("str", "string");
            case Kind::kBool:
                return builtin("bool", "boolean");
            case Kind::kNumber:
                return builtin("number", "number");
            case Kind::kNull:
                return builtin("null", "null");
            case Kind::kAny:
                return builtin("any", "value");
            case Kind::kArray: {
                const std::string element = name_of(*type.element);
                const std::string name = "[" + element + "]";
                if (names_.emplace(name, name).second) {
                    entries_.push_back({{"name", name}, {"meta-type", "array"}, {"element-type", element}});
                }
                return name;
            }
            case Kind::kObject:
                if (is_empty(type)) return std::string(kEmptyName);
                break;
            case Kind::kEnum:
            case Kind::kAlternate:
                break;
        }
        return numbered(type, {});
    }

    std::string builtin(std::string_view name, std::string_view json_type) {
        if (names_.emplace(name, name).second) {
            entries_.push_back({{"name", name}, {"meta-type", "builtin"}, {"json-type", json_type}});
        }
        return std::string(name);
    }

    /// Types of one name are one entry, however often the tables spell them; those without a name are told apart by
    /// where they are.
    std::string numbered(const Type& type, std::string_view box) {
        std::string key = type.name.empty() ? fmt::format("@{}", static_cast<const void*>(&type))
                                            : fmt::format("{}:{}", type.name, box);
        const auto [it, fresh] = names_.emplace(std::move(key), "");
        if (fresh) {
            it->second = std::to_string(++last_number_);
            pending_.push_back({&type, it->second, box});
        }
        return it->second;
    }

    void add_members(json::array& out, const Type& type) {
        if (type.base) add_members(out, *type.base);
        for (const Member& member : type.members) {
            json::object entry{{"name", member.name}, {"type", name_of(*member.type)}};
            if (member.optional) entry["default"] = nullptr;
            add_features(entry, member.features);
            out.push_back(std::move(entry));
        }
    }

    json::object describe(const Pending& pending) {
        const Type& type = *pending.type;
        json::object entry{{"name", pending.name}};
        if (!pending.box.empty()) {
            entry["meta-type"] = "object";
            entry["members"] = json::array{{{"name", pending.box}, {"type", name_of(type)}}};
            return entry;
        }
        if (type.kind == Kind::kEnum) {
            entry["meta-type"] = "enum";
            json::array members;
            json::array values;
            for (const EnumValue& value : type.values) {
                json::object member{{"name", value.name}};
                add_features(member, value.features);
                members.push_back(std::move(member));
                values.emplace_back(value.name);
            }
            entry["members"] = std::move(members);
            entry["values"] = std::move(values);
        } else if (type.kind == Kind::kAlternate) {
            entry["meta-type"] = "alternate";
            json::array members;
            for (const Branch& branch : type.branches) members.push_back({{"type", name_of(*branch.type)}});
            entry["members"] = std::move(members);
        } else {
            entry["meta-type"] = "object";
            json::array members;
            add_members(members, type);
            entry["members"] = std::move(members);
            if (!type.tag.empty()) add_variants(entry, type);
        }
        add_features(entry, type.features);
        return entry;
    }

    /// Every value of the tag is a case; those that add nothing have the empty object.
    void add_variants(json::object& entry, const Type& type) {
        entry["tag"] = type.tag;
        const auto tag = std::ranges::find(type.members, type.tag, &Member::name);
        json::array variants;
        for (const EnumValue& value : tag->type->values) {
            const auto variant = std::ranges::find(type.variants, value.name, &Variant::value);
            const Type* members = variant == type.variants.end() ? nullptr : variant->type;
            const bool boxed = members && type.fold == Fold::kLegacy;
            variants.push_back(
                {{"case", value.name}, {"type", boxed ? numbered(*members, type.fold_member) : name_of(members)}});
        }
        entry["variants"] = std::move(variants);
    }

    json::array entries_;
    std::deque<Pending> pending_;
    std::map<std::string, std::string> names_;
    size_t last_number_ = 0;
};

template <class List>
json::array names(const List& list) {
    json::array out;
    for (const auto* item : list) out.push_back({{"name", item->name}});
    return out;
}

}  // namespace

json::array introspect() { return Describer().run(); }
json::array command_list() { return names(commands()); }
json::array event_list() { return names(events()); }

}  // namespace gantry::schema
