"""A `torch` whose GPU works, for nodes of machines that have none."""

from pathlib import Path

TORCH = """
__version__ = "0"

def zeros(*size, device):
    pass

class cuda:
    is_initialized = lambda: True
    get_device_name = lambda: "NVIDIA Tested"
    get_device_properties = lambda: None
"""


def write_torch(folder: Path) -> dict[str, str]:
    """Write it into a folder; return the environment of a node that finds it there."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(TORCH)
    return {"PYTHONPATH": f"{folder}:{Path.cwd()}"}
