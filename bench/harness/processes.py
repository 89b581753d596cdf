"""CPU time and memory of process trees, and how busy the rest of the machine is."""

import os
import resource

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def process_tree(pid):
    """The process and all its descendants."""
    found, to_visit = [], [pid]
    while to_visit:
        current = to_visit.pop()
        found.append(current)
        try:
            for task in os.listdir("/proc/%d/task" % current):
                with open("/proc/%d/task/%s/children" % (current, task)) as file:
                    to_visit += [int(child) for child in file.read().split()]
        except OSError:
            pass  # it has ended meanwhile
    return found


def tree_cpu_seconds(pid):
    """utime + stime of a tree, with the children it has reaped and its io_uring workers, without kernel threads
    (writeback)."""
    ticks = 0
    for process in process_tree(pid):
        try:
            with open("/proc/%d/stat" % process) as file:
                fields = file.read().rsplit(")", 1)[1].split()
            ticks += sum(int(field) for field in fields[11:15])
        except OSError:
            pass
    return ticks / TICKS_PER_SECOND


def tree_rss_kib(pid):
    total = 0
    for process in process_tree(pid):
        try:
            with open("/proc/%d/status" % process) as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        except OSError:
            pass
    return total


def own_cpu_seconds():
    """This process and its children that have ended: the clients."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def machine_cpu_seconds():
    """Everything but idle and waiting for I/O."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / TICKS_PER_SECOND
