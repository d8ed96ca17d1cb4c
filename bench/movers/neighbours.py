"""How much others used the cores while something was measured; a quiet machine says about 0."""

import os
import resource
from pathlib import Path


class Neighbours:
    """Starts counting when made. Only children that have ended by the time it is asked count as
    this process's own."""

    def __init__(self) -> None:
        self._began_s = self._now()

    def cores(self) -> float:
        """Return the cores that other processes, and other guests of the host, took on average."""
        wall_s, others_s = (
            now - before for now, before in zip(self._now(), self._began_s, strict=True)
        )
        return max(0.0, others_s / wall_s) if wall_s else 0.0

    def _now(self) -> tuple[float, float]:
        """Seconds by the clock, and of all cores' time that was not this process's."""
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return uptime, busy_s(Path("/proc/stat").read_text()) - sum(
            one.ru_utime + one.ru_stime for one in used
        )


def busy_s(stat: str) -> float:
    """Return seconds that processes ran or wanted to but could not, from what /proc/stat says."""
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(
        int, stat.splitlines()[0].split()[1:9]
    )
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")
