"""The memory of a run: bytes of each part, the parts of each phase, and a comparison with a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table

_GIB = 1 << 30


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device, bytes.

    Args:
        name: name of the device.
        total: total memory.
        free: unused memory.
        is_host: it is the host's memory, which also holds the rollout buffer and offloaded parts.
    """

    name: str
    total: int
    free: int
    is_host: bool = False


@dataclass(frozen=True)
class Share:
    """A part that takes a share of a device's memory, whatever it needs.

    Args:
        fraction: of the device's memory.
        remark: what it holds.
        least: bytes that it must hold.
        option: the key that sets it.
    """

    fraction: float
    remark: str
    least: int
    option: str


@dataclass
class Estimate:
    """Bytes of each part, and the parts that are alive in each phase; phases do not overlap.

    Args:
        parts: bytes and a remark, by part.
        phases: names of the parts that are alive, by phase.
        host: parts that are in the host's memory on any device.
        resident: names of the parts that are on the device in all phases.
        shares: parts that take a share of the device's memory.
        processes: number of processes of the run on a machine, which share its host memory.
        of_first: names of parts that only the first process has.
    """

    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    phases: dict[str, list[str]] = field(default_factory=dict)
    host: dict[str, tuple[int, str]] = field(default_factory=dict)
    resident: list[str] = field(default_factory=list)
    shares: dict[str, Share] = field(default_factory=dict)
    processes: int = 1
    of_first: set[str] = field(default_factory=set)

    def add_phase(self, phase: str, *used: str, new: Mapping[str, tuple[int, str]]) -> None:
        """Add a phase that uses the parts that are always on the device, ``used``, and ``new`` parts.

        Args:
            phase: its name.
            used: names of further parts; offloaded ones are on the device in this phase.
            new: bytes and a remark of parts that are added.
        """
        self.parts |= new
        self.phases[phase] = list(dict.fromkeys([*self.resident, *used, *new]))

    def peak(self, phase: str, total: int = 0) -> int:
        """Return the bytes alive in a phase.

        Args:
            phase: its name.
            total: memory of the device, for parts that take a share of it; 0 leaves them out.
        """
        return sum(self._size(name, total) for name in self.phases[phase])

    def _size(self, name: str, total: int) -> int:
        return int(self.shares[name].fraction * total) if name in self.shares else self.parts[name][0]

    def table(self) -> Table:
        """Return the table of parts and phases."""
        table = Table(title="memory by part")
        for name in ("part", "GiB", "of"):
            table.add_column(name, overflow="fold")
        for name, (size, remark) in self.parts.items():
            table.add_row(name, gib(size), remark)
        for name, (size, remark) in self.host.items():
            table.add_row(f"{name}, on the host", gib(size), remark)
        for name, share in self.shares.items():
            table.add_row(name, f"{share.fraction:.0%}", f"of the GPU's memory, {share.remark}")
        table.add_section()
        always = set.intersection(*map(set, self.phases.values()))
        for phase, parts in self.phases.items():
            more = [name for name in parts if name not in always]
            table.add_row(f"peak of {phase}", gib(self.peak(phase)), " + ".join(["parts of all phases", *more]))
        return table

    def verdict(self, device: DeviceMemory) -> str:
        """Return a sentence that says if the largest peak fits, and if not, names its largest part.

        Args:
            device: device to compare with. For host memory, every phase also counts the parts in ``host``, and all
                processes count.
        """
        for name, share in self.shares.items():
            if share.fraction * device.total < share.least:
                return (
                    f"{device.name} has {gib(device.total)} GiB: {name}, {share.fraction:.0%} of it, does not hold its "
                    f"weights, {gib(share.least)} GiB; raise {share.option}"
                )
        beside = list(self.host) if device.is_host else []
        phase, need = self.need(device)
        several = f" of {self.processes} processes" if device.is_host and self.processes > 1 else ""
        size = f"{gib(need)} GiB{several}" + (f" with the {' and the '.join(beside)}" if beside else "")
        line = f"{device.name} has {gib(device.free)} GiB free of {gib(device.total)}: "
        if need <= device.free:
            return line + f"the largest peak, {size} in {phase}, fits"
        largest = max(self.phases[phase], key=lambda name: self._size(name, device.total))
        return line + f"the peak of {phase}, {size}, does not fit; its largest part is {largest}"

    def need(self, device: DeviceMemory) -> tuple[str, int]:
        """Return the phase that needs most of a device, and the bytes, counted as for :meth:`verdict`."""
        needs = {phase: self._need(phase, device) for phase in self.phases}
        phase = max(needs, key=needs.__getitem__)
        return phase, needs[phase]

    def _need(self, phase: str, device: DeviceMemory) -> int:
        """Return the bytes of a device that a phase needs."""
        peak = self.peak(phase, device.total)
        if not device.is_host:
            return peak
        others = peak - sum(self._size(name, device.total) for name in self.phases[phase] if name in self.of_first)
        beside = sum(size for size, _ in self.host.values())
        return peak + (self.processes - 1) * others + self.processes * beside


def gib(size: int) -> str:
    """Return bytes as a number of GiB."""
    return f"{size / _GIB:.2f}" if size >= _GIB / 100 else f"{size / _GIB:.5f}"
