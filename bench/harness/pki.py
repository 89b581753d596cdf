"""Keys and certificates for the TLS suites, made once by GnuTLS' certtool and psktool."""

import os
import subprocess

CA = "cn = bench CA\nca\ncert_signing_key\nexpiration_days = 365\n"
SERVER = "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\nencryption_key\n" \
    "expiration_days = 365\n"
CLIENT = "cn = bench client\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days = 365\n"


def make(directory):
    """The folder with ca-cert.pem, server-{cert,key}.pem, client-{cert,key}.pem and keys.psk (user qemu)."""
    folder = os.path.join(directory, "pki")
    if os.path.exists(os.path.join(folder, "keys.psk")):
        return folder
    os.makedirs(folder, exist_ok=True)

    def path(name):
        return os.path.join(folder, name)

    def certtool(*arguments):
        subprocess.run(["certtool", "--ecc", *arguments], check=True, capture_output=True)

    for name, template in (("ca", CA), ("server", SERVER), ("client", CLIENT)):
        with open(path(name + ".cfg"), "w") as file:
            file.write(template)
        certtool("--generate-privkey", "--outfile", path(name + "-key.pem"))
        kind = ["--generate-self-signed"] if name == "ca" else \
            ["--generate-certificate", "--load-ca-certificate", path("ca-cert.pem"), "--load-ca-privkey", path("ca-key.pem")]
        certtool(*kind, "--load-privkey", path(name + "-key.pem"), "--template", path(name + ".cfg"),
                 "--outfile", path(name + "-cert.pem"))
    subprocess.run(["psktool", "-u", "qemu", "-p", path("keys.psk")], check=True, capture_output=True)
    return folder
