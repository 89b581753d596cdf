// Which CPUs threads run on.

#pragma once

namespace gantry {

/// Remembers what the calling thread may use as what this process may use. Before any thread follows a CPU.
void note_process_cpus();
/// The calling thread runs on `cpu` only, until spread_thread(); false when this process may not use it.
bool keep_thread_on(int cpu);
/// The calling thread runs where the process may.
void spread_thread();

/// The CPU that thread `tid` of this machine ran on last; -1 when that cannot be seen. Reads /proc (some 10 us).
int cpu_of_thread(int tid);

}  // namespace gantry
