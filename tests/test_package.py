"""What is shipped: a wheel made of the sdist, installed into an environment of its own, and used in somebody's folder.

That folder has a `model.py`, a `pipeline/`, a `trainer/` and a `configs/` of its own: none of them is ever imported or
read in place of ours, nor by Ray's workers, nor under torchrun.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "pipeline", "trainer", "configs")

DATA = (
    "configs/demo.yaml",
    "configs/recipes/demo.yaml",
    "configs/queries/paper.sql",
    "pipeline/estimate/rates.json",
    "pipeline/report/page.html.j2",
    "pipeline/report/curation.html.j2",
    "pipeline/explore/page/index.html",
    "pipeline/explore/page/main.js",
    "pipeline/explore/page/style.css",
    "pipeline/sources/openmoji/groups.txt",
    "model/pretrained/demo_autoencoder/config.json",
    "model/pretrained/demo_autoencoder/diffusion_pytorch_model.safetensors",
)

FOREIGN = 'raise RuntimeError("this is somebody else\'s module")\n'

BUILD = [
    "shard_samples=8", "max_failures=0.6", "sources.openmoji.limit=12", "sources.openmoji.fetch.timeout=3",
    "sources.openmoji.fetch.idle_timeout=1", "images.max_side=64",
    "columns={captions/source: {}, latents/demo-64: {autoencoder: demo, resolution: 64}, "
    "text/minilm@source: {encoder: minilm}}",
]  # fmt: skip

# three steps of the demo's recipe, with a small network
TRAIN = [
    "selection=null", "hold_out=2", "lanes=4", "model.dim=64", "model.patch_mixer_dim=64", "stages.0.batch=8",
    "stages.0.images=16", "stages.1.batch=8", "stages.1.images=8",
    "sample_every=1000", "validate_every=1000", "text={text/minilm@source: 1}",
]  # fmt: skip


@dataclass
class Installed:
    """The wheel in an environment whose other packages are those of this one, but for its own microdit."""

    sdist: Path
    wheel: Path
    bin: Path
    folder: Path
    """Somebody's folder, in which everything is run."""

    def run(self, program: str, *arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("RAY_", "AWS_"))}
        environment |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "RAY_worker_register_timeout_seconds": "300"}
        done = subprocess.run(
            [self.bin / program, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{program} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def packages(python: Path) -> Path:
    """The folder of packages of a virtual environment."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(python.parent.parent)}))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    built = tmp_path_factory.mktemp("built")
    made = {"capture_output": True, "text": True, "check": False}

    def build(*command: str) -> None:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, **made)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    build("hatchling", "build", "-t", "sdist", "-d", str(built))
    (sdist,) = built.glob("*.tar.gz")
    pip = ("pip", "--disable-pip-version-check")
    build(*pip, "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(built), str(sdist))
    (wheel,) = built.glob("*.whl")
    venv.create(built / "venv", with_pip=False, symlinks=True)
    python = built / "venv/bin/python"
    # .pth files in a folder that a .pth file names are not read: so the editable microdit of this environment is absent
    (packages(python) / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    build(*pip, "--python", str(python), "install", "-q", "--no-index", "--no-deps", "--force-reinstall", str(wheel))
    return Installed(sdist, wheel, python.parent, somebodys_folder(built / "somebody"))


def somebodys_folder(folder: Path) -> Path:
    """A folder with modules that are called like ours, and fail if they are imported."""
    (folder / "configs/recipes").mkdir(parents=True)
    (folder / "configs/__init__.py").write_text(FOREIGN)
    (folder / "configs/mine.yaml").write_text("name: [\n")
    (folder / "model.py").write_text(FOREIGN)
    for name in ("pipeline", "trainer"):
        (folder / name).mkdir()
        for module in ("__init__", "__main__", "config", "corpus", "train"):
            (folder / name / f"{module}.py").write_text(FOREIGN)
    return folder


def test_the_wheel_holds_our_package_alone(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert {name.removesuffix(".dist-info").partition("-")[0] for name in top} == {"microdit"} and len(top) == 2
    ours = {name for name in names if name.startswith("microdit/")}
    source = {
        f"microdit/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours == source | {"microdit/__init__.py"}
    assert {f"microdit/{name}" for name in DATA} <= ours
    assert not [name for name in names if "test" in name.lower()]
    with tarfile.open(installed.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert ours <= inside and {"README.md", "LICENSE", "pyproject.toml", "constraints.txt"} <= inside
    assert {name.split("/")[0] for name in inside} == {
        "microdit", "README.md", "LICENSE", "pyproject.toml", "constraints.txt", "PKG-INFO", ".gitignore"
    }  # fmt: skip


def test_the_installed_package_is_used(installed: Installed) -> None:
    program = "import microdit, microdit.model, microdit.pipeline, microdit.trainer; print(microdit.__file__)"
    assert (
        Path(installed.run("python", "-c", program).strip())
        == packages(installed.bin / "python") / "microdit/__init__.py"
    )
    text = installed.run("microdit", "--help")
    assert "microdit build configs/demo.yaml" in text and "generate" in text


@pytest.mark.timeout(600)
def test_build_and_train_in_somebodys_folder(installed: Installed) -> None:
    """Ray's workers build the corpus, the command and torchrun train on it, with configs that come with the wheel."""
    installed.run("microdit", "build", "configs/demo.yaml", "--corpus", "corpus", *BUILD)
    sql = "SELECT count(*) AS n FROM samples WHERE status = 'ok' AND has_latents_demo_64 AND has_text_minilm_source"
    (row,) = json.loads(installed.run("microdit", "query", "corpus", sql, "--json"))["rows"]
    assert row["n"] >= 10
    recipe = ("configs/recipes/demo.yaml", "corpus=corpus", *TRAIN)
    installed.run("microdit", "train", *recipe, "out=run")
    here = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1")
    torchrun = ("-m", "torch.distributed.run", *here, "-m", "microdit.trainer")
    installed.run("python", *torchrun, *recipe, "out=torchrun")
    for out in ("run", "torchrun"):
        assert (installed.folder / out / "checkpoints/step-00000003/model.safetensors").is_file()
