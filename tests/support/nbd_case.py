"""Tests that speak NBD themselves to a daemon at `socket`, which serves `image` as `disk`."""

import gantry_test as gt
import nbd_raw as nbd


class RawCase(gt.Case):
    """setUp of the derived class starts the daemon and sets `socket` and `image`."""

    def raw(self):
        client = nbd.Raw(self.socket)
        self.addCleanup(client.close)
        return client

    def greeted(self):
        client = self.raw()
        self.assertEqual(client.greet(), 3)
        return client

    def entered(self, name="disk", **options):
        client = self.raw()
        client.enter(name, **options)
        return client

    def contents(self):
        with open(self.image, "rb") as file:
            return file.read()
