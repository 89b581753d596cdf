#include "cli/guest_hints.h"

#include <fmt/format.h>

#include <algorithm>

namespace gantry::cli {

namespace {

/// As one word of a shell's command line.
std::string shell_word(std::string_view text) {
    constexpr std::string_view kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/=,:+@%";
    if (std::ranges::all_of(text, [&](char c) { return kPlain.find(c) != std::string_view::npos; })) {
        return std::string(text);
    }
    std::string out = "'";
    for (const char c : text) out += c == '\'' ? "'\\''" : std::string(1, c);
    return out + "'";
}

/// In qemu's key=value lists a comma is written twice.
std::string qemu_value(std::string_view text) {
    std::string out;
    for (const char c : text) out += c == ',' ? ",," : std::string(1, c);
    return out;
}

/// In an attribute between apostrophes.
std::string xml_value(std::string_view text) {
    std::string out;
    for (const char c : text) {
        switch (c) {
            case '&':
                out += "&amp;";
                break;
            case '<':
                out += "&lt;";
                break;
            case '\'':
                out += "&apos;";
                break;
            default:
                out += c;
        }
    }
    return out;
}

}  // namespace

std::string guest_hints(std::string_view socket, unsigned queues) {
    std::string out = "qemu (from 9.2 on reconnect-ms=1000 instead of reconnect=1; the size is that of -m):\n";
    out += "    -object memory-backend-memfd,id=mem,size=4G,share=on -machine memory-backend=mem -m 4G \\\n";
    out += fmt::format("    -chardev {} \\\n",
                       shell_word(fmt::format("socket,id=disk,path={},reconnect=1", qemu_value(socket))));
    out += fmt::format("    -device vhost-user-blk-pci,chardev=disk,num-queues={}\n", queues);
    out += "cloud-hypervisor:\n    --memory size=4G,shared=on \\\n";
    out +=
        fmt::format("    --disk {}\n",
                    shell_word(fmt::format("vhost_user=true,socket={},num_queues={},queue_size=256", socket, queues)));
    out += "libvirt:\n";
    out += "    <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n";
    out += "    <disk type='vhostuser' device='disk'>\n";
    out += fmt::format("      <driver name='qemu' type='raw' queues='{}'/>\n", queues);
    out += fmt::format("      <source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>\n",
                       xml_value(socket));
    out += "      <target dev='vda' bus='virtio'/>\n    </disk>\n";
    return out;
}

}  // namespace gantry::cli
