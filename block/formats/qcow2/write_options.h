// The runtime options that govern writing (spec/qcow2.md section 19): defaults, refusals. Pure.

#pragma once

#include <string_view>

#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/metadata.h"
#include "schema/options.h"

namespace gantry::block::qcow2 {

/// The options that a reopen may change, those of the caches too.
inline constexpr std::string_view kReopenOptionNames[] = {
    "lazy-refcounts",      "pass-discard-request", "pass-discard-snapshot",
    "pass-discard-other",  "discard-no-unref",     "overlap-check",
    "cache-size",          "l2-cache-size",        "l2-cache-entry-size",
    "refcount-cache-size", "cache-clean-interval"};

/// kInvalid: what version 2 does not have; nonsense in overlap-check.
Result<WriteOptions> write_options(const schema::Options& options, const Header& header, DiscardMode discard,
                                   std::string_view node);

bool same_options(const WriteOptions& a, const WriteOptions& b);

}  // namespace gantry::block::qcow2
