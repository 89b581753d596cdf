// Permissions of an edge of the graph (spec/qmp.md section 12.1).

#pragma once

#include <cstdint>
#include <string>

namespace gantry::block {

/// A set over {consistent-read, write, write-unchanged, resize}. The bit numbers are those of the file lock bytes.
enum class Perm : uint8_t {
    kNone = 0,
    kConsistentRead = 1 << 0,
    kWrite = 1 << 1,
    kWriteUnchanged = 1 << 2,
    kResize = 1 << 3,
    kAll = 0xf,
};
constexpr Perm operator|(Perm a, Perm b) { return static_cast<Perm>(static_cast<uint8_t>(a) | static_cast<uint8_t>(b)); }
constexpr Perm operator&(Perm a, Perm b) { return static_cast<Perm>(static_cast<uint8_t>(a) & static_cast<uint8_t>(b)); }
constexpr Perm operator~(Perm a) { return static_cast<Perm>(~static_cast<uint8_t>(a) & 0xf); }
constexpr Perm& operator|=(Perm& a, Perm b) { return a = a | b; }
constexpr Perm& operator&=(Perm& a, Perm b) { return a = a & b; }
constexpr bool any(Perm p) { return p != Perm::kNone; }

/// What an edge takes from its child, and what it lets others take.
struct EdgePerms {
    Perm need = Perm::kNone;
    Perm share = Perm::kAll;
    bool operator==(const EdgePerms&) const = default;
};

/// "consistent read, write" in the reference's words.
std::string perm_names(Perm set);

}  // namespace gantry::block
