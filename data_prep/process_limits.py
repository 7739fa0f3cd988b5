"""Limits that the kernel sets to a decoder's CPU time and memory, within the hard limits of the machine (`ulimit -H -a`)."""

import math
import resource

# FFmpeg mistakes the kernel's refusal of memory for damage or a busy machine. So the parent checks the memory first, and the
# kernel's limit only stops what grows faster than the parent looks. It is this much higher, since the kernel also counts
# memory that is reserved and never touched.
_RESERVED_MB = 4096


class HardLimitError(ValueError):
    """The machine limits a process to less than a decoder needs. The message names the limit and how to raise it."""


def check(cpu_s: int, memory_mb: int) -> None:
    """Checks that the hard limits of this process leave a decoder what it needs.

    Args:
      cpu_s: CPU seconds of the process since its start.
      memory_mb: Resident memory, MiB.

    Raises:
      HardLimitError: One of them is too low.
    """
    kinds = (
        (resource.RLIMIT_CPU, cpu_s, 1, "s of CPU time", "-t", "--cpu_limit"),
        (resource.RLIMIT_DATA, memory_mb + _RESERVED_MB, 1 << 20, "MiB of data", "-d", "--memory_limit"),
        (resource.RLIMIT_AS, memory_mb + _RESERVED_MB, 1 << 20, "MiB of address space", "-v", "--memory_limit"),
    )
    for kind, needed, unit, what, letter, option in kinds:
        hard = resource.getrlimit(kind)[1]
        # At the hard limit of CPU time the kernel kills as it does when memory runs out, without the signal that tells why.
        if hard != resource.RLIM_INFINITY and hard <= needed * unit:
            raise HardLimitError(
                f"a process may use only {hard // unit} {what} here (`ulimit -H {letter}`), but a decoder needs {needed}: "
                f"raise that limit, or use another machine or a smaller {option}"
            )


def limit(cpu_s: int, memory_mb: int) -> None:
    """Limits this process to so many more seconds of CPU time, and to so much memory.

    Only soft limits are set, since the next video has limits of its own. That of the address space is lifted: the kernel
    counts memory in it that nobody can touch, more on machines with many cores.

    Raises:
      HardLimitError: The machine does not allow it.
    """
    spent = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s += math.ceil(spent.ru_utime + spent.ru_stime)
    check(cpu_s, memory_mb)
    hard = {kind: resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_AS)}
    soft = {**hard, resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_DATA: memory_mb + _RESERVED_MB << 20}
    try:
        for kind in hard:
            resource.setrlimit(kind, (soft[kind], hard[kind]))
    except (ValueError, OSError) as error:
        raise HardLimitError(f"the kernel refuses to limit a decoder to {cpu_s} s and {memory_mb} MiB: {error}") from error
