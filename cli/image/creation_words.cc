#include "cli/image/creation_words.h"

#include "cli/readable.h"
#include "schema/keyval.h"

namespace gantry::cli::image {

Result<block::CreationWords> creation_words(const Words& words) {
    block::CreationWords out;
    for (const OptionUse& use : words.options) {
        if (use.name == "option") {
            TRY(schema::OptionValue parsed, schema::parse_option_value(use.value, ""));
            for (const auto& [key, value] : parsed.object) {
                if (value.is_string()) {
                    out.emplace_back(key, value.get_string());
                } else if (value.is_object()) {  // encrypt.format and its like
                    for (const auto& [inner, text] : value.get_object()) {
                        if (!text.is_string())
                            return fail(ErrorKind::kInvalid, "Invalid parameter '{}.{}'", std::string_view(key),
                                        std::string_view(inner));
                        out.emplace_back(fmt::format("{}.{}", std::string_view(key), std::string_view(inner)),
                                         text.get_string());
                    }
                } else {
                    return fail(ErrorKind::kInvalid, "Invalid parameter '{}'", std::string_view(key));
                }
            }
        }
        if (use.name == "backing") out.emplace_back("backing_file", use.value);
        if (use.name == "backing-format") out.emplace_back("backing_fmt", use.value);
    }
    return out;
}

void print_options(std::span<const block::CreationOption> options) {
    std::vector<std::vector<std::string>> rows{{"NAME", "VALUE", "MEANING"}};
    for (const block::CreationOption& o : options)
        rows.push_back({std::string(o.name), std::string(o.kind), std::string(o.doc)});
    std::fputs(table(rows).c_str(), stdout);
}

}  // namespace gantry::cli::image
