"""What tests of vhost-user-blk share: a daemon with exports on unix sockets, disks of guests that end with the test."""

import os
import signal

from gantry_test import GANTRY, IS_GANTRY, MIB, Case, Daemon, freeze, wait_for  # noqa: F401
from vhost_disk import Disk
from vhost_front import Connection

SIZE = 8 * MIB


class VhostCase(Case):
    def setUp(self):
        super().setUp()
        self.disks = {}

    def export_option(self, name="disk", node=None, socket=None, writable=True, **more):
        """The words of --export; keyword arguments: num_queues means num-queues."""
        options = {"type": "vhost-user-blk", "id": name, "node-name": node or name, "addr.type": "unix",
                   "addr.path": self.path(socket or f"{name}.sock"), "writable": "on" if writable else "off",
                   **{key.replace("_", "-"): value for key, value in more.items()}}
        return ["--export", ",".join(f"{key}={value}" for key, value in options.items())]

    def image(self, name="disk", size=SIZE, data=None):
        path = self.path(f"{name}.raw")
        with open(path, "wb") as file:
            file.write(data or b"")
            file.truncate(size)
        return path

    def node_option(self, name="disk", size=SIZE, data=None):
        """A new raw image."""
        return ["--blockdev", f"driver=file,node-name={name},filename={self.image(name, size, data)},discard=unmap"]

    def null_option(self, name="null", size=SIZE, **more):
        words = "".join(f",{key.replace('_', '-')}={value}" for key, value in more.items())
        return ["--blockdev", f"driver=null-co,node-name={name},size={size},read-zeroes=on{words}"]

    def serve(self, *options, name="disk", size=SIZE, data=None, **export):
        """A daemon with one export of a new raw image, and with other options."""
        self.server = self.daemon(*self.node_option(name, size, data), *self.export_option(name, **export), *options)
        return self.server

    def disk(self, name="disk", open=True, kind=Disk, **options):
        """The guest's side of an export, connected and started; the one before it is closed."""
        if name in self.disks:
            self.disks[name].close()
        self.disks[name] = disk = kind(self.path(f"{name}.sock"), **options)
        self.addCleanup(disk.close)
        return disk.open() if open else disk

    def connection(self, name="disk"):
        connection = Connection(self.path(f"{name}.sock"))
        self.addCleanup(connection.close)
        return connection

    def content(self, name="disk", offset=0, length=None):
        """The raw image as it is now."""
        with open(self.path(f"{name}.raw"), "rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def works(self, disk, offset=0):
        """It answers requests with the right data."""
        data = os.urandom(4096)
        disk.write(offset, data)
        self.assertEqual(disk.read(offset, 4096), data)

    def stuck_node_option(self, name="stuck", size=SIZE, **more):
        """A node whose requests take as long as the test wants: an NBD server, a process of its own, that can be stopped; the
        image is NAME.raw."""
        socket = self.path(f"{name}-nbd.sock")
        directory = self.path(f"{name}-server")
        os.mkdir(directory)
        self.image(name, size)
        server = Daemon(directory, "--blockdev", f"driver=file,node-name=image,filename={self.path(f'{name}.raw')},discard=unmap",
                        "--nbd-server", f"addr.type=unix,addr.path={socket}",
                        "--export", "type=nbd,id=image,node-name=image,name=image,writable=on")
        self.addCleanup(server.kill)
        self.backing = server
        words = "".join(f",{key.replace('_', '-')}={value}" for key, value in more.items())
        return ["--blockdev",
                f"driver=nbd,node-name={name},export=image,server.type=unix,server.path={socket},discard=unmap{words}"]

    def freeze(self):
        freeze(self.backing.process)

    def thaw(self):
        self.backing.process.send_signal(signal.SIGCONT)
