"""System: what the operating system and the numeric libraries give a process.

No file here knows of jobs, workers or hosts. A *segment* is anonymous shared memory (a memfd),
passed on as a file descriptor; a *channel* is a Unix socket between processes of one host.

cgroup          the limits that control groups put on memory and cores, of both versions
dtypes          tables of dtypes: which can be stored, and which stay constant in training
folders         the working folder, and temporary folders that are removed with their owner
futex           waiting on a 32-bit word in shared memory, in the kernel
json_files      JSON files: atomic writes, NaN to null and back, digests of files
look_clock      the time between two looks at others, as far as it counts as silence
machine         the cores and the memory that this process may use (affinity, cgroups)
messages        typed messages: frozen structs, as MessagePack, strictly decoded
numerics        the numerics profile: what, besides the job, the bits depend on
object_graph    what can be reached from the user's objects, each with the path to it
own_generators  random number generators that the user's objects hold, found and seeded
process_title   what `ps` shows of each process
private_files   files written for this user alone, whole or not at all
processes       processes that die with their parent; signals that stop a run
seeding         seeds as pure functions of their purpose
shared_memory   segments: created, mapped, and checked against the memory that there is
spin_budget     how often a word is looked at before a process sleeps
spelling        the known name that somebody probably meant
torch_patches   everything of torch that is replaced, and why
unix_channel    messages with file descriptors between processes of one host
unix_socket     Unix sockets at paths of any length, and typed messages on them
"""
