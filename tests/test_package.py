"""The package around the operators: build, loading, errors, tools."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mamba2_cuda
from mamba2_cuda import _load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_ptxas  # noqa: E402


def test_import_needs_no_build():
    code = "import sys, mamba2_cuda; print('torch' in sys.modules, mamba2_cuda.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["False", mamba2_cuda.__version__], run.stderr


def test_build_info_names_archs():
    info = mamba2_cuda.build_info()
    assert info["version"] == mamba2_cuda.__version__
    assert info["with_cuda"] == bool(info["archs"])
    assert Path(info["ops"]).name.startswith("_ops.abi3")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'ssd_scam'"):
        mamba2_cuda.ssd_scam  # noqa: B018


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_old_torch_is_refused(version):
    with pytest.raises(
        _load.BuildError, match=r"needs torch 2\.11 or newer, found torch " + version[0]
    ):
        _load.check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0+cpu", "3.0.0a0+git1"])
def test_new_torch_is_taken(version):
    _load.check_torch(version)


def test_missing_library_says_how_to_build(tmp_path):
    with pytest.raises(_load.BuildError, match="_ops is not built .*make build"):
        _load.find_library("_ops", tmp_path)


def test_broken_library_explains_itself(tmp_path, monkeypatch):
    (tmp_path / "_ops.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    with pytest.raises(_load.BuildError, match="_ops.abi3.so does not load with torch"):
        _load.load_ops.__wrapped__()


LOG = """
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        (LOG.format(stack=0, stores=0), 0),
        (LOG.format(stack=0, stores=8), 1),
        (LOG.format(stack=32, stores=0), 1),
        (LOG.format(stack=32, stores=8), 2),
        (LOG.format(stack=0, stores=0) + "ptxas info : (C7510) Potential Performance Loss", 1),
    ],
)
def test_ptxas_log_is_judged(text, complaints):
    kernels, loose = check_ptxas.judge(text)
    assert kernels[0][:3] == ["_Z1kPf", "sm_90a", 168]
    assert len(kernels[0][3]) + len(loose) == complaints


def test_no_kernel_is_no_pass(tmp_path):
    assert check_ptxas.main(tmp_path) == 1


def test_explain():
    plan = mamba2_cuda.explain(b=2, l=130, h=3, p=5, n=7, dtype=torch.float64, device=(9, 0, 132))
    assert (plan["tier"], plan["q"], plan["chunks"]) == ("any", 64, 6)
    packed = mamba2_cuda.explain(b=1, l=130, h=3, p=5, n=7, sequences=4, device="cpu")
    assert (packed["tier"], packed["chunks"]) == ("cpu", 130 // 64 + 4)


def test_explain_tells_kernels():
    """The emulation's library is asked for more: tests/emulation/test_explain.py."""
    problem = dict(b=2, l=300, h=4, p=64, n=128, dtype=torch.bfloat16)
    assert mamba2_cuda.explain(**problem, device="cpu")["kernels"] == []
    on_a_card = mamba2_cuda.explain(**problem, device=(8, 0, 108))
    if not mamba2_cuda.build_info()["with_cuda"]:
        assert on_a_card["kernels"] is None
        return
    stages = [kernel["stage"] for kernel in on_a_card["kernels"]]
    assert stages == ["chunk_cumsum", "chunk_state", "chunk_scan"]
    assert on_a_card["workspace_bytes"] > 0


PLAN_OF_A_HOPPER = """
#include <cstdio>
#include "ssd/plan.h"
int main() {
  mamba2::ssd::Problem problem;
  problem.shape = {2, 300, 4, 64, 1, 128, 2, false};
  problem.dtype = mamba2::DType::bf16;
  const auto plan = mamba2::ssd::make_plan(problem, {9, 0, 132}, 0);
  std::printf("%d %s", static_cast<int>(plan.tier), plan.reason);
}
"""


@pytest.mark.parametrize(
    "archs, tier", [("8.0+PTX;9.0a", 3), ("80,90a-real", 3), ("8.0+PTX", 2), ("9.0", 2), ("", 3)]
)
def test_a_hopper_card_without_code_for_it_takes_the_portable_path(archs, tier, tmp_path):
    """In code for other archs the kernels of tier sm90 are empty: nothing may choose them."""
    (tmp_path / "plan.cpp").write_text(PLAN_OF_A_HOPPER)
    sources = [ROOT / "csrc/ssd" / f"{name}.cpp" for name in ("plan", "plan_sm80", "plan_sm90")]
    command = ["g++", "-std=c++17", f'-DMAMBA2_ARCHS="{archs}"', f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, tmp_path / "plan.cpp", *sources, "-o", tmp_path / "plan"], check=True)
    said = subprocess.run([tmp_path / "plan"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{tier} ")
    assert ("no code for 9.0a" in said) == (tier == 2)


def test_explain_refuses_other_types():
    with pytest.raises(ValueError, match="dtype must be float64.*got int32"):
        mamba2_cuda.explain(b=1, l=1, h=1, p=1, n=1, dtype=torch.int32, device="cpu")


def test_operators_know_no_python():
    library = mamba2_cuda.build_info()["ops"]
    command = ["nm", "-D", "--undefined-only", library]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = run.stdout.split()
    assert any("aoti_torch" in name for name in wanted), "not a library of operators"
    assert not [name for name in wanted if name.startswith(("Py", "_Py"))]


def kernels(key):
    """The operators of the library that have a kernel for a dispatch key."""
    mamba2_cuda.ssd_scan  # noqa: B018  loads the library
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mamba2_cuda::")]
    return {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, key)}


def test_every_cpu_operator_answers_on_cuda():
    assert kernels("CPU") == kernels("CUDA")
    assert "mamba2_cuda::ssd_scan_forward" in kernels("CPU")


def test_cpu_only_build_says_so():
    if mamba2_cuda.build_info()["with_cuda"]:
        pytest.skip("this build has CUDA kernels")
    x, dt, A = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), torch.ones(1)
    state = torch.ops.mamba2_cuda.ssd_segment_state_forward.default
    with pytest.raises(RuntimeError, match="this build is for the CPU alone"):
        state._op_dk(torch._C.DispatchKey.CUDA, x, dt, A, x, None, False, 0.0, 1.0, 0)


def test_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == names["x"].grad.shape == (2, 300, 4, 64)


def test_readme_names_files_that_exist():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / "README.md").read_text())
    assert "docs/architecture.md" in links
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("name", mamba2_cuda.__all__)
def test_public_names_are_there(name):
    assert getattr(mamba2_cuda, name) is not None
    assert name in dir(mamba2_cuda)
