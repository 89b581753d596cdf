// Eventfds that a process shares with us which is not trusted. It may fill the counter, empty it at any moment and
// change the flags of the descriptor (they belong to both ends), so that a read or write of ours would wait for it.

#pragma once

namespace gantry::virtio {

/// Descriptors from outside that claim to be eventfds: others could block us. Any thread.
bool is_eventfd(int fd);

/// Adds one to the counter; one that is full stays as it is. Never blocks. Any thread.
void raise_eventfd(int fd);

/// Takes what the counter has. 0, also when there was nothing, or -errno. Never blocks. Any thread.
int take_eventfd(int fd);

}  // namespace gantry::virtio
