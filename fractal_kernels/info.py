"""``python -m fractal_kernels.info``: what is there, what is missing, why, and how to get it."""

from __future__ import annotations

import platform

import torch

from . import __version__, backends


def report() -> str:
    """The environment and every backend's state, a line each.

    Example:
        >>> "reference" in report()
        True
    """
    module, problem = backends.extension()
    lines = [
        f"fractal_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
    ]
    if module is not None:
        build = module.build_info()
        lines.append("extension: " + ", ".join(f"{key} {value}" for key, value in build.items()))
        lines.append(f"CPU kernels run with: {module.simd_in_use()}")
    else:
        lines.append(f"extension: missing: {problem}")
    cuda, problem = backends.extension("cuda")
    built = problem if cuda is None else ", ".join(f"{key} {value}" for key, value in cuda.build_info().items())
    lines.append(f"CUDA extension: {built}")
    for name in backends.NAMES:
        reason = backends.why_not(name)
        lines.append(f"backend {name}: " + (f"unavailable: {reason}" if reason else "available"))
    lines.append("fused activation: ReLU; with others (SiLU, Mish, ...) batch norms and joins are fused all the same")
    if torch.cuda.is_available():
        name = backends.automatic(torch.device("cuda"), torch.float32)
        lines.append(f"CUDA device: ops on its tensors use the backend {name!r} unless another is named")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
