"""Certificates for tests, made by certtool: an authority, and whatever it or another one has signed."""

import os
import shutil
import subprocess

from gantry_test import require


class Authority:
    def __init__(self, directory, name="Test CA"):
        require("certtool")
        self.directory, self.name = directory, name
        os.makedirs(directory, exist_ok=True)
        self.cert, self.key = self._new("ca", [f'cn = "{name}"', "ca", "cert_signing_key", "crl_signing_key"], None)

    def _tool(self, *words, **environment):
        subprocess.run(["certtool", *words], check=True, capture_output=True, cwd=self.directory,
                       env={**os.environ, **environment})

    def _new(self, prefix, template, authority, password=None):
        key, cert, plan = (os.path.join(self.directory, prefix + end) for end in ("-key.pem", "-cert.pem", ".template"))
        if not os.path.exists(key):
            secret = ["--password", password, "--pkcs8", "--pkcs-cipher", "aes-128"] if password else []
            self._tool("--generate-privkey", "--key-type", "ecdsa", "--curve", "secp256r1", *secret, "--outfile", key)
        if not any(line.startswith(("expiration", "activation")) for line in template):
            template = [*template, "expiration_days = 30"]
        with open(plan, "w") as file:
            file.write("\n".join(template) + "\n")
        words = ["--load-privkey", key, "--template", plan, "--outfile", cert]
        if password:
            words += ["--password", password]
        if authority:
            words = ["--generate-certificate", "--load-ca-certificate", authority[0], "--load-ca-privkey", authority[1], *words]
        else:
            words = ["--generate-self-signed", *words]
        self._tool(*words)
        return cert, key

    def issue(self, prefix, name, use="client", names=(), lines=(), issuer=None, password=None):
        """PREFIX-cert.pem and PREFIX-key.pem. `use`: client, server or None for no purpose. The pair of paths."""
        template = [f'cn = "{name}"', 'organization = "Example"', "signing_key", *lines]
        if use:
            template.append(f"tls_www_{use}")
        for other in names:
            template.append(f'{"ip_address" if other[0].isdigit() else "dns_name"} = "{other}"')
        return self._new(prefix, template, issuer or (self.cert, self.key), password)

    def revoke(self, *certificates):
        """The path of a list that revokes them."""
        plan, out, all_ = (os.path.join(self.directory, name) for name in ("crl.template", "ca-crl.pem", "revoked.pem"))
        with open(plan, "w") as file:
            file.write("crl_next_update = 30\ncrl_number = 1\n")
        with open(all_, "w") as file:
            for certificate in certificates:
                file.write(open(certificate).read())
        self._tool("--generate-crl", "--load-ca-privkey", self.key, "--load-ca-certificate", self.cert,
                   "--load-certificate", all_, "--template", plan, "--outfile", out)
        return out


def install(directory, ca=None, server=None, client=None, crl=None):
    """A directory with the names that tls-creds-x509 looks for."""
    os.makedirs(directory, exist_ok=True)
    for name, path in (("ca-cert.pem", ca), ("server-cert.pem", server and server[0]), ("server-key.pem", server and server[1]),
                       ("client-cert.pem", client and client[0]), ("client-key.pem", client and client[1]),
                       ("ca-crl.pem", crl)):
        if path:
            shutil.copy(path, os.path.join(directory, name))
    return directory
