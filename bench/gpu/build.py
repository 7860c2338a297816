"""Build react_fast in a copy of the tree, offline: `python -m bench.gpu.build FOLDER`.

For a machine whose Python has torch, pybind11, CMake and ninja, but not this library; the checkout is only read.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("react_fast", "csrc", "tests", "bench", "examples")
FILES = ("CMakeLists.txt", "pyproject.toml", "README.md")


def copied(tree: Path) -> None:
    leave = shutil.ignore_patterns("__pycache__", "_core*.so", "kernels", "out")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=leave, dirs_exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    leave = shutil.ignore_patterns("__pycache__")
    for folder in (tree, tree / "react_fast"):
        shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=leave, dirs_exist_ok=True)


def built(tree: Path) -> None:
    import pybind11

    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    made = tree / "build"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(
        [cmake, "-S", tree, "-B", made, "-DCMAKE_BUILD_TYPE=Release", *generator, *options], check=True
    )
    subprocess.run([cmake, "--build", made, "--parallel"], check=True)
    for module in made.glob("_core*.so"):
        shutil.copy(module, tree / "react_fast")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    copied(target)
    built(target)
    probe = "import react_fast._core, react_fast.kernels; print(react_fast.__file__)"
    subprocess.run([sys.executable, "-c", probe], cwd=target, check=True)
