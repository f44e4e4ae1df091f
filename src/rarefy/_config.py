"""What this installation runs on: the first thing to paste into a question."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata


@dataclass(frozen=True)
class Config:
    """Versions and the native core's choices; `str()` is a table, `asdict()` what a run's `environment.json` holds."""

    rarefy: str
    python: str
    torch: str
    numpy: str
    platform: str
    cpu: str
    cuda: str
    isa: str
    available: tuple[str, ...]
    threads: int
    compiler: str

    def asdict(self) -> dict[str, object]:
        """Return the fields as a plain dict."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {name: value for name, value in asdict(self).items() if name not in ("isa", "available")}
        rows["native core"] = f"{self.isa} (this CPU has {', '.join(self.available)}; RAREFY_ISA chooses)"
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def show_config() -> Config:
    """Return what this installation runs on; print it to see a table.

    Versions of rarefy, Python, PyTorch and NumPy, the platform and CPU, the CUDA device ("none" without one), the
    instruction set that the native kernels use and those that this CPU has, the number of threads, and the compiler.

    >>> show_config().threads >= 1
    True
    """
    import torch

    from rarefy.kernels import native_config

    native = native_config()
    return Config(
        rarefy=native["version"],
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=metadata.version("numpy"),
        platform=platform.platform(),
        cpu=_cpu(),
        cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        isa=native["isa"],
        available=tuple(native["available"]),
        threads=native["threads"],
        compiler=native["compiler"],
    )


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
