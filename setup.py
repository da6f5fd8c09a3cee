"""Builds the two extension modules; docs/building.md explains every choice and variable.

mamba2_cuda._ops   every operator, CPU and CUDA, through PyTorch's stable ABI: one file serves every
                   Python and every torch from 2.11 on.
mamba2_cuda._C     pybind11: version, archs, the plan of a problem. Built for this Python alone.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as missing:
    raise SystemExit(
        f"mamba2_cuda needs {missing.name} to build: install torch (2.11 or newer), pybind11 and "
        "ninja, then build with --no-build-isolation (docs/building.md)"
    ) from missing

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0+PTX;9.0a"
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11
COMMON_FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", f"-fmacro-prefix-map={ROOT}/="]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mamba2_cuda/_version.py").read_text())[1]


def cuda_toolkit():
    """The folder that holds include/cuda_runtime.h and bin/nvcc, or None for a CPU-only build.

    MAMBA2_CUDA=0 asks for a CPU-only build, MAMBA2_CUDA=1 makes a missing toolkit an error.
    nvcc on PATH may be a wrapper script, so nvcc itself is asked where its toolkit is.
    """
    wanted = os.environ.get("MAMBA2_CUDA", "")
    if wanted == "0":
        return None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        candidates += re.findall(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    for candidate in filter(None, candidates):
        home = Path(candidate).resolve()
        if (home / "include/cuda_runtime.h").exists() and (home / "bin/nvcc").exists():
            return home
    if wanted == "1":
        raise SystemExit("MAMBA2_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    print("mamba2_cuda: no nvcc found, building for the CPU alone", file=sys.stderr)
    return None


def archs():
    """The compute capabilities to build for, as TORCH_CUDA_ARCH_LIST gives them."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHS
    os.environ["TORCH_CUDA_ARCH_LIST"] = listed  # torch's own default needs a GPU
    return ";".join(listed.replace(";", " ").split())


def sources(with_cuda):
    """What _ops is made of: all of csrc but bindings.cpp; a *_cuda.cpp file needs the toolkit."""
    found = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    found = [p for p in found if p.name != "bindings.cpp"]
    if not with_cuda:
        found = [p for p in found if p.suffix == ".cpp" and not p.stem.endswith("_cuda")]
    stems = [str(p.with_suffix("")) for p in found]
    if clash := {s for s in stems if stems.count(s) > 1}:
        raise SystemExit(f"a .cpp and a .cu share a name, and would share an object: {clash}")
    return sorted(map(str, found))


def headers():
    return sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")
    )


def cudart(toolkit):
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    for folder in folders:
        if (library := toolkit / folder / "libcudart_static.a").exists():
            return str(library)
    raise SystemExit(f"libcudart_static.a is not under {toolkit}")


def operators(toolkit, macros):
    macros = [*macros, ("TORCH_TARGET_VERSION", STABLE_ABI_TARGET)]
    link = ["-Wl,--no-undefined", "-Wl,--exclude-libs,ALL"]
    flags = {"cxx": [*COMMON_FLAGS, "-O3", "-fno-math-errno", "-fno-trapping-math"]}
    if toolkit:
        macros.append(("USE_CUDA", None))
        extra = os.environ.get("MAMBA2_NVCC_FLAGS", "").split()
        flags["nvcc"] = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", *extra]
        link += [cudart(toolkit), "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "mamba2_cuda._ops",
        sources(bool(toolkit)),
        include_dirs=[str(toolkit / "include")] if toolkit else [],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
        depends=headers(),
        py_limited_api=True,
    )


def questions(macros):
    plan = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/ssd").glob("plan*.cpp"))
    return Extension(
        "mamba2_cuda._C",
        ["csrc/bindings.cpp", *plan],
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={"cxx": [*COMMON_FLAGS, "-O2"]},
        depends=headers(),
        language="c++",
    )


class Build(cpp_extension.BuildExtension):
    """Always asks ninja, which knows what is stale: setuptools sees neither flags nor archs change.

    Objects of different modules and configurations lie apart. nvcc runs through
    tools/nvcc_logged.py, which keeps what ptxas said beside each object.
    """

    def finalize_options(self):
        super().finalize_options()
        self.force = True
        self.build_temp += "-cuda" if cpp_extension.CUDA_HOME else "-cpu"

    def run(self):
        # A wheel takes all that lies there, and what an earlier build left is not of this one.
        for built in Path(self.build_lib, "mamba2_cuda").glob("*.so"):
            built.unlink()
        super().run()

    def build_extension(self, extension):
        everything, self.build_temp = self.build_temp, f"{self.build_temp}/{extension.name}"
        if torch.version.cuda is None:
            self.drop_stale_objects()
        super().build_extension(extension)
        self.build_temp = everything

    def drop_stale_objects(self):
        """Next to a CPU-only torch ninja is not told which headers a .cu file includes."""
        headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
        newest = max(path.stat().st_mtime for path in headers)
        for built in Path(self.build_temp).rglob("*.o"):
            source = (ROOT / built.relative_to(self.build_temp)).with_suffix(".cu")
            if source.exists() and built.stat().st_mtime < newest:
                built.unlink()


toolkit = cuda_toolkit()
cpp_extension.CUDA_HOME = str(toolkit) if toolkit else None
if toolkit:
    logged = [sys.executable, str(ROOT / "tools/nvcc_logged.py"), str(toolkit / "bin/nvcc")]
    os.environ["PYTORCH_NVCC"] = " ".join(logged)

macros = [
    ("MAMBA2_WITH_CUDA", "1" if toolkit else "0"),
    ("MAMBA2_ARCHS", f'"{archs() if toolkit else ""}"'),
    ("MAMBA2_VERSION", f'"{VERSION}"'),
]
# A wheel of the operators alone fits every Python; with _C it fits the one that built it.
wanted = os.environ.get("MAMBA2_MODULES", "_ops _C").split()
modules = {"_ops": lambda: operators(toolkit, macros), "_C": lambda: questions(macros)}
setup(
    ext_modules=[modules[name]() for name in wanted],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if wanted == ["_ops"] else {},
)
