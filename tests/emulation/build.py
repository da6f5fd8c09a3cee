"""Builds shared libraries of csrc for the host emulation (docs/emulation.md): every kernel as plain
C++, one fiber per CUDA thread, its operators registered for CPU tensors.

    python tests/emulation/build.py        builds build/emulation/emulated.so

A source is compiled again when it, a header it includes, or a flag has changed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "emulation"
NAMESPACE = "mamba2_cuda_emulated"
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11


def cuda_include():
    """The toolkit's headers: types of 16 bits and vectors, which a host compiler takes as well."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        homes += re.findall(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    homes += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    for home in filter(None, homes):
        include = Path(home) / "include"
        if (include / "cuda_bf16.h").exists():
            return include.resolve()
    return None


def flags(defines=()):
    """Compiler flags common to all sources."""
    return [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-gnu-unique",  # two builds of the same inline variables live in one process
        "-Wall",
        "-Wno-psabi",
        "-Wno-class-memaccess",  # the toolkit's 16-bit types are copied as bytes
        "-DMAMBA2_EMULATE",
        *[f"-D{d}" for d in defines],
        "-isystem",
        str(cuda_include()),
    ]


def torch_flags():
    from torch.utils import cpp_extension

    includes = [flag for p in cpp_extension.include_paths() for flag in ("-isystem", p)]
    return [*includes, f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]


def operator_sources():
    """What the CUDA library is made of, less what only a real device has."""
    found = [p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cpp")]
    left_out = {"bindings.cpp", "device_cuda.cpp"}
    kept = [p for p in found if p.name not in left_out and not p.stem.endswith("_cpu")]
    return [*sorted(kept), HERE / "device_emulated.cpp"]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_current(obj, record, command):
    if not (obj.exists() and record.exists()):
        return False
    known = json.loads(record.read_text())
    if known["command"] != command:
        return False
    return all(Path(p).exists() and digest(p) == d for p, d in known["files"].items())


def compile_one(source, options, folder):
    """The object of one source, and whether it had to be compiled."""
    name = str(Path(source).resolve().relative_to(ROOT)).replace("/", ".")
    obj, record, deps = (folder / (name + end) for end in (".o", ".json", ".d"))
    # nvcc gives every .cu the runtime's header; here it is the emulation's.
    is_cuda = Path(source).suffix == ".cu"
    special = ["-include", str(CSRC / "ptx/emulation.h")] if is_cuda else torch_flags()
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *options, *special]
    command += ["-MD", "-MF", str(deps), "-x", "c++", "-c", str(source), "-o", str(obj)]
    if is_current(obj, record, command):
        return obj, False
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile for the emulation:\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    files = deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    files = [f for f in files if str(ROOT) in str(Path(f).resolve())]
    record.write_text(json.dumps({"command": command, "files": {f: digest(f) for f in files}}))
    return obj, True


def build(name, sources, defines=()):
    """Compiles what changed, links build/emulation/<name>.so and returns its path. One process at a
    time: those of parallel tests wait for the first."""
    if not cuda_include():
        raise RuntimeError("the emulation needs the headers of a CUDA toolkit: set CUDA_HOME")
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_alone(name, folder, sources, defines)


def build_alone(name, folder, sources, defines):
    options = flags(defines)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        built = list(pool.map(lambda s: compile_one(s, options, folder), sources))
    library, record = OUT / f"{name}.so", folder / "linked.json"
    objects = [str(obj) for obj, _ in built]
    linked = json.loads(record.read_text()) if record.exists() else None
    if linked != objects or not library.exists() or any(fresh for _, fresh in built):
        compiler = os.environ.get("CXX", "g++")
        fresh = library.with_suffix(f".{os.getpid()}.so")
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL", "-o", str(fresh)]
        torch_library = torch_link_flags() if any(".cpp.o" in o for o in objects) else []
        subprocess.run([compiler, *objects, *link, *torch_library], check=True)
        fresh.replace(library)  # a process that has the old one loaded keeps it
        record.write_text(json.dumps(objects))
    return library


def torch_link_flags():
    from torch.utils import cpp_extension

    (folder, *_) = cpp_extension.library_paths()
    return [f"-L{folder}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}"]


def build_operators():
    """The library of all operators, under torch.ops.mamba2_cuda_emulated."""
    defines = [f"MAMBA2_OP_NAMESPACE={NAMESPACE}", "MAMBA2_DISPATCH_KEY=CPU"]
    return build("emulated", operator_sources(), defines)


if __name__ == "__main__":
    print(build_operators())
