"""The public operators. Importing this loads the compiled library (`mamba2_cuda._ops`)."""

from mamba2_cuda._load import load_ops

load_ops()

from mamba2_cuda.ops.add_norm import add_norm, add_norm_  # noqa: E402
from mamba2_cuda.ops.causal_conv1d import causal_conv1d, causal_conv1d_step  # noqa: E402
from mamba2_cuda.ops.cross_entropy import cross_entropy  # noqa: E402
from mamba2_cuda.ops.gated_rmsnorm import gated_rmsnorm  # noqa: E402
from mamba2_cuda.ops.norm_linear import (  # noqa: E402
    linear_rows,
    linear_rows_at_once,
    norm_linear,
    norm_linear_add_norm_,
)
from mamba2_cuda.ops.plan import batch_invariant  # noqa: E402
from mamba2_cuda.ops.ssd_scan import ssd_scan  # noqa: E402
from mamba2_cuda.ops.ssd_segment_state import ssd_segment_state  # noqa: E402
from mamba2_cuda.ops.ssd_step import ssd_step  # noqa: E402

__all__ = [
    "add_norm",
    "add_norm_",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_entropy",
    "gated_rmsnorm",
    "linear_rows",
    "linear_rows_at_once",
    "norm_linear",
    "norm_linear_add_norm_",
    "ssd_scan",
    "ssd_segment_state",
    "ssd_step",
]
