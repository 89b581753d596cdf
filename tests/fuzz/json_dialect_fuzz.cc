// Any bytes through the reader of QMP: it ends, and what it accepts is written and read back the same.

#include <cstdint>
#include <string_view>

#include "runtime/check.h"
#include "schema/json_dialect.h"
#include "schema/schema.h"
#include "schema/validate.h"

using namespace gantry::schema;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view input(reinterpret_cast<const char*>(data), size);
    const JsonLimits limits{.token_bytes = 1 << 16, .tokens = 1 << 12, .nesting = 64};
    JsonReader reader(limits);
    // In two pieces, cut where the first byte says, and in one: the messages are the same.
    const size_t cut = size ? data[0] % size : 0;
    reader.feed(input.substr(0, cut));
    JsonReader whole(limits);
    whole.feed(input);
    bool fed = false;
    for (;;) {
        auto message = reader.next();
        if (!message && !fed) {
            fed = true;
            reader.feed(input.substr(cut));
            continue;
        }
        auto same = whole.next();
        CHECK(message.has_value() == same.has_value(), "where the input is cut does not matter");
        if (!message) break;
        CHECK(message->has_value() == same->has_value(), "where the input is cut does not matter");
        if (!*message) {
            CHECK(message->error().message() == same->error().message(), "where the input is cut does not matter");
            continue;
        }
        const std::string text = to_json(**message);
        auto again = parse_json(text);
        CHECK(again, "what the writer writes can be read");
        if (text.find("-0") == text.npos) CHECK(to_json(*again) == text, "and says the same");
        if ((*message)->is_object()) {
            for (const Command* command : commands()) {
                auto valid = validate_arguments(*command, (*message)->get_object());
                // Whatever passes is normal: it passes again unchanged.
                if (!valid) continue;
                auto twice = validate_arguments(*command, *valid);
                CHECK(twice && *twice == *valid, "normalised arguments are normal");
            }
        }
    }
    whole.finish();
    while (whole.next()) {
    }
    return 0;
}
