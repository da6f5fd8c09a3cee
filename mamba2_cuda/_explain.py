"""Questions to the build: what it holds, and which kernels a problem gets."""

from mamba2_cuda._load import load_ops, load_questions


def build_info():
    """What this build holds, as a dict.

    Returns version; with_cuda; archs, the compute capabilities it was built for as in
    TORCH_CUDA_ARCH_LIST ("" on a CPU-only build); ops, the path of the operator library.
    Raises BuildError when a compiled part is missing.
    """
    return {**load_questions().build_info(), "ops": str(load_ops())}
