"""The smallest NBD client: tells whether a server answers a read."""

import socket
import struct


def receive(connection, count):
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise OSError("the server closed the connection")
        data += chunk
    return data


def hello(path):
    """Connects and reads the greeting; OSError when anything goes wrong."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(path)
        if receive(connection, 18)[:16] != b"NBDMAGICIHAVEOPT":
            raise OSError("not a newstyle NBD server")


def first_read(path, export, length=4096):
    """Connects, negotiates simple replies and reads the first bytes; OSError when anything goes wrong."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(path)
        if receive(connection, 18)[:16] != b"NBDMAGICIHAVEOPT":
            raise OSError("not a newstyle NBD server")
        name = export.encode()
        option = struct.pack(">8sIII", b"IHAVEOPT", 7, len(name) + 6, len(name)) + name + b"\0\0"
        connection.sendall(struct.pack(">I", 3) + option)
        reply_type = 3
        while reply_type == 3:
            _, _, reply_type, size = struct.unpack(">QIII", receive(connection, 20))
            receive(connection, size)
        if reply_type != 1:
            raise OSError("export refused: %#x" % reply_type)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, length))
        magic, error, _ = struct.unpack(">IIQ", receive(connection, 16))
        if magic != 0x67446698 or error:
            raise OSError("read refused: %d" % error)
        receive(connection, length)
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
