// Any bytes as the files of TLS and authorization: pre-shared keys, certificates, rules.

#include <cstdint>
#include <string>
#include <string_view>

#include "nbd/authz/authz.h"
#include "nbd/tls/certificates.h"
#include "nbd/tls/psk_keys.h"
#include "runtime/check.h"
#include "schema/json_dialect.h"
#include "schema/schema.h"
#include "schema/validate.h"

using namespace gantry;
using namespace gantry::nbd;

namespace {

void keys(std::string_view text) {
    const auto parsed = parse_psk_keys(text, "keys.psk");
    if (!parsed) {
        CHECK(parsed.error().message().size() < 200, "an error does not quote the file");
        return;
    }
    for (const auto& [identity, key] : *parsed) {
        CHECK(!identity.empty() && identity.size() <= 256, "identities are bounded");
        CHECK(key.size() >= 1 && key.size() <= 512, "keys are bounded");
    }
}

void certificates(std::string_view pem) {
    const auto chain = import_certificates(pem, "x.pem");
    if (!chain) return;
    CHECK(!chain->empty() && chain->size() <= 16, "a chain is bounded");
    for (const CertificatePtr& c : *chain) {
        for (const std::string& text :
             {certificate_subject(c.get()), certificate_issuer(c.get()), certificate_names(c.get())}) {
            CHECK(!text.empty() && text.find('\n') == std::string::npos, "names fit into a line of the log");
        }
        for (const CertificateUse use :
             {CertificateUse::kAuthority, CertificateUse::kServer, CertificateUse::kClient}) {
            (void)check_own_certificate(c.get(), "x.pem", use);
        }
    }
    for (unsigned bit = 0; bit < 32; ++bit) {
        CHECK(!explain_verification(*chain, 1u << bit, "client", "ca.pem", "CN=x").empty(), "every status has words");
    }
}

void rules(std::string_view text) {
    auto value = schema::parse_json(text);
    if (!value || !value->is_object()) return;
    auto valid = schema::validate(schema::type("AuthZListProperties"), std::move(value->get_object()));
    if (!valid) return;
    const AuthzRules parsed = AuthzRules::from(*valid);
    for (const char* identity : {"", "CN=a", "O=Example,CN=alice"}) (void)parsed.allows(identity);
    if (parsed.rules.empty()) CHECK(parsed.allows("CN=a") == parsed.allow, "without rules the policy decides");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
    switch (data[0]) {
        case 'k':
            keys(text);
            break;
        case 'c':
            certificates(text);
            break;
        case 'r':
            rules(text);
            break;
        default:
            break;
    }
    return 0;
}
