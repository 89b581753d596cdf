// Any bytes through the option parsers and the types they serve.

#include <cstdint>
#include <string_view>

#include "runtime/check.h"
#include "schema/json_dialect.h"
#include "schema/keyval.h"
#include "schema/schema.h"

using namespace gantry::schema;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view input(reinterpret_cast<const char*>(data), size);
    struct Row {
        const char* type;
        const char* implied;
        KeyvalStyle style;
    };
    for (const Row& row :
         {Row{"BlockdevOptions", "driver", KeyvalStyle::kDotted},
          Row{"BlockExportOptions", "type", KeyvalStyle::kDotted},
          Row{"ObjectOptions", "qom-type", KeyvalStyle::kDotted}, Row{"NbdServerOptions", "", KeyvalStyle::kDotted},
          Row{"MonitorOptions", "chardev", KeyvalStyle::kDotted},
          Row{"ChardevOptions", "backend", KeyvalStyle::kFlat}}) {
        std::vector<std::string> warnings;
        auto options = row.style == KeyvalStyle::kFlat ? parse_chardev(input, warnings)
                                                       : parse_option(type(row.type), input, row.implied, row.style);
        if (!options) continue;
        // What the command line yields is what QMP would accept.
        auto again = validate(type(row.type), *options);
        CHECK(again && *again == *options, "both ways in give the same options");
    }
    return 0;
}
