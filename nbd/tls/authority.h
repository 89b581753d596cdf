// Making what TLS needs: a certificate authority with certificates, or pre-shared keys.

#pragma once

#include <string>
#include <vector>

#include "runtime/error.h"

namespace gantry::nbd {

struct TlsFilesOptions {
    std::string dir;  // made (0700) when it is not there
    /// Names and addresses of the server that clients will use.
    std::vector<std::string> server_names;
    std::string client_name = "client";
    unsigned days = 3650;
};

/// A new authority, a server and a client certificate: ca-cert.pem, ca-key.pem, server-cert.pem, server-key.pem,
/// client-cert.pem, client-key.pem; keys are 0600. ECDSA P-256. The files written; kExists when one is there already,
/// and then nothing is written. Blocks.
Result<std::vector<std::string>> make_certificates(const TlsFilesOptions& options);

/// One more client of the authority in `options.dir`, into the directory `client_dir`: ca-cert.pem, client-cert.pem,
/// client-key.pem. Blocks.
Result<std::vector<std::string>> make_client_certificate(const TlsFilesOptions& options, const std::string& client_dir);

/// keys.psk with a new key of 256 bits for each identity. Blocks.
Result<std::vector<std::string>> make_psk_file(const std::string& dir, const std::vector<std::string>& identities);

}  // namespace gantry::nbd
