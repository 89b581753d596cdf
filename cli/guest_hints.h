// What virtual machine monitors want to be told about a disk of type vhost-user-blk.

#pragma once

#include <string>
#include <string_view>

namespace gantry::cli {

/// Lines to paste: for qemu, cloud-hypervisor and libvirt, each with the shared memory that the disk needs.
std::string guest_hints(std::string_view socket, unsigned queues);

}  // namespace gantry::cli
