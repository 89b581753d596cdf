"""Connects to a URI again and again for some seconds: how many handshakes a second."""

import json
import sys
import time

import nbd

uri, seconds = sys.argv[1], float(sys.argv[2])
begun = time.monotonic()
connections = 0
while time.monotonic() - begun < seconds:
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    handle.shutdown()
    connections += 1
print(json.dumps({"connections": connections, "seconds": time.monotonic() - begun}))
