"""nvcc, with what it and ptxas say kept beside the object: OBJECT.log.

    python tools/nvcc_logged.py NVCC ARGUMENTS...

The build puts this in nvcc's place, so that tools/check_ptxas.py can judge every kernel of an
incremental build, and the console stays readable: only what is not `ptxas info` is passed on.
"""

import subprocess
import sys


def main(command):
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "-o" in command:
        with open(command[command.index("-o") + 1] + ".log", "w") as log:
            log.write(run.stdout)
    for line in run.stdout.splitlines():
        if run.returncode or not is_statistic(line):
            print(line, file=sys.stderr)
    return run.returncode


def is_statistic(line):
    """Whether a line is one of those -Xptxas=-v prints for every kernel."""
    return (line.startswith("ptxas info") and "(C" not in line) or "bytes stack frame" in line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
