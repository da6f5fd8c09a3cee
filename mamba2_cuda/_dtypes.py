"""Element types as the operators take them: csrc/core/dtype.h's integers."""

import torch

DTYPE_CODE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = {code: dtype for dtype, code in DTYPE_CODE.items()}
