"""TLS of a client as GnuTLS does it, for what the ssl module cannot say: key updates, records with nothing in them."""

import ctypes
import ssl
import struct
import time
from socket import SO_RCVTIMEO, SOL_SOCKET

DEADLINE = 20
CLIENT, CERTIFICATE, PEM = 2, 1, 1
AGAIN, INTERRUPTED = -28, -52
PUSH = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def library():
    gnutls = ctypes.CDLL("libgnutls.so.30")
    gnutls.gnutls_strerror.restype = ctypes.c_char_p
    for name in ("gnutls_record_recv", "gnutls_record_send"):
        function = getattr(gnutls, name)
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_ssize_t
    gnutls.gnutls_record_send2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint]
    gnutls.gnutls_record_send2.restype = ctypes.c_ssize_t
    return gnutls


class GnutlsSocket:
    """Over a connected socket, like one. What is sent after hold() leaves in one piece at flush()."""

    def __init__(self, socket, certificate, key):
        self.socket, self.gnutls, self.held, self.holding = socket, library(), bytearray(), False
        # A read that waits too long says AGAIN, as does one that met a record without data.
        socket.setblocking(True)
        socket.setsockopt(SOL_SOCKET, SO_RCVTIMEO, struct.pack("ll", 1, 0))
        self.session, self.credentials = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.gnutls.gnutls_init(ctypes.byref(self.session), CLIENT))
        self.check(self.gnutls.gnutls_set_default_priority(self.session))
        self.check(self.gnutls.gnutls_certificate_allocate_credentials(ctypes.byref(self.credentials)))
        self.check(self.gnutls.gnutls_certificate_set_x509_key_file(self.credentials, certificate.encode(), key.encode(), PEM))
        self.check(self.gnutls.gnutls_credentials_set(self.session, CERTIFICATE, self.credentials))
        self.gnutls.gnutls_transport_set_int2(self.session, socket.fileno(), socket.fileno())
        self.push = PUSH(self.pushed)
        self.gnutls.gnutls_transport_set_push_function(self.session, self.push)
        self.check(self.gnutls.gnutls_handshake(self.session))

    def check(self, result):
        if result < 0:
            raise ssl.SSLError(self.gnutls.gnutls_strerror(result).decode())
        return result

    def pushed(self, _, data, size):
        self.held += ctypes.string_at(data, size)
        if not self.holding:
            self.flush()
        return size

    def hold(self):
        self.holding = True

    def flush(self):
        data, self.held, self.holding = bytes(self.held), bytearray(), False
        self.socket.sendall(data)

    def sendall(self, data):
        for at in range(0, len(data), 16384):
            part = data[at:at + 16384]
            assert self.check(self.gnutls.gnutls_record_send(self.session, part, len(part))) == len(part)

    def send_nothing(self, padding):
        """A record without data, as long as `padding` makes it."""
        self.check(self.gnutls.gnutls_record_send2(self.session, b"", 0, padding, 0))

    def update_key(self, of_peer=False):
        self.check(self.gnutls.gnutls_session_key_update(self.session, int(of_peer)))

    def recv(self, size):
        data, deadline = ctypes.create_string_buffer(size), time.monotonic() + DEADLINE
        while (got := self.gnutls.gnutls_record_recv(self.session, data, size)) in (AGAIN, INTERRUPTED):
            if time.monotonic() > deadline:
                raise TimeoutError("nothing came")
        return data.raw[:self.check(got)]

    def close(self):
        self.socket.close()
        self.gnutls.gnutls_deinit(self.session)
        self.gnutls.gnutls_certificate_free_credentials(self.credentials)
        self.session = None
