"""Judges what ptxas said about every kernel of a build; fails on what makes a kernel slow.

    python tools/check_ptxas.py [FOLDER, default build]

Fails on register spills, stack frames, the C75xx warnings (wgmma serialised) and on a build that
left no kernel to judge. Prints the registers of every kernel and arch.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALISED = re.compile(r"\(C75\d\d\)")


def judge(text):
    """The kernels of one log as (name, arch, registers, complaints), and complaints about none."""
    kernels, loose = [], []
    for line in text.splitlines():
        if found := COMPILING.search(line):
            kernels.append([found[1], found[2], 0, []])
        elif SERIALISED.search(line):
            loose.append(line.strip())
        elif kernels and (found := FRAME.search(line)):
            stack, stores, loads = map(int, found.groups())
            if stores or loads:
                kernels[-1][3].append(f"{stores} bytes spill stores, {loads} bytes spill loads")
            if stack:
                kernels[-1][3].append(f"{stack} bytes stack frame")
        elif kernels and (found := REGISTERS.search(line)):
            kernels[-1][2] = int(found[1])
    return kernels, loose


def demangle(names):
    if not shutil.which("c++filt") or not names:
        return names
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return out.stdout.splitlines()


def main(folder):
    logs = sorted(Path(folder).rglob("*.o.log"))
    kernels, complaints = [], []
    for log in logs:
        judged, loose = judge(log.read_text())
        kernels += judged
        complaints += [f"{log.name}: {line}" for line in loose]
    for kernel, name in zip(kernels, demangle([k[0] for k in kernels])):
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        short = re.sub(r"\(.*", "", name)
        print(f"{kernel[1]:8} {kernel[2]:4} registers  {short}")
        complaints += [f"{kernel[1]} {short}: {complaint}" for complaint in kernel[3]]
    print(f"{len(kernels)} kernels in {len(logs)} files, {len(complaints)} complaints")
    for complaint in complaints:
        print("  " + complaint)
    if not kernels:
        print(f"no kernel was compiled under {folder}: nothing was checked")
    return 1 if complaints or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "build"))
