// The one shape of a refusal: the sentence tools look for, then which node, what, where and what was found there.

#pragma once

#include <string_view>
#include <utility>

#include "runtime/error.h"

namespace gantry::block::qcow2 {

/// "<sentence>; node '<node>': <detail>".
template <class... Args>
std::unexpected<Error> refuse(ErrorKind kind, std::string_view node, std::string_view sentence,
                              fmt::format_string<Args...> detail, Args&&... args) {
    return std::unexpected(Error(
        kind, fmt::format("{}; node '{}': {}", sentence, node, fmt::format(detail, std::forward<Args>(args)...))));
}

/// The image contradicts itself.
template <class... Args>
std::unexpected<Error> refuse_corrupt(std::string_view node, std::string_view sentence,
                                      fmt::format_string<Args...> detail, Args&&... args) {
    return refuse(ErrorKind::kCorrupt, node, sentence, detail, std::forward<Args>(args)...);
}

}  // namespace gantry::block::qcow2
