"""``brainfound doctor``: what this installation can do on this machine."""

from __future__ import annotations

import json

from brainfound.cli.terminal import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Say versions, device and optional parts; a fault comes with its remedy."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from brainfound import __version__
    from brainfound.recipes import available

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "brainfound": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: installed(name) for name in ("torch", "transformers", "accelerate", "datasets", "peft", "nibabel")},
        **{name: installed(name) for name in ("xformers", "dask", "dcm2niix")},
        "gpus": gpus or "none: training runs on the CPU",
        "recipes": len(available("train")),
        "adapters": len(available("adapters")),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        print(f"{key:<14}{value}")
