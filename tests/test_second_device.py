"""Every operator runs on the GPU that its tensors are on, whichever is the current one."""

import pytest
import torch

from mamba2_cuda.model import Mamba2LMHeadModel, ModelConfig, Sampling, generate

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    d_model=256, n_layer=2, vocab_size=250, ssm_cfg=dict(d_state=128, headdim=64), d_intermediate=64
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]


def results(dtype, device):
    """Logits, gradients by parameter, and what the model says, with a CUDA graph and without."""
    torch.manual_seed(0)
    model = Mamba2LMHeadModel(CONFIG, dtype=dtype).to(device)
    tokens = torch.randint(0, 250, (2, 300), generator=torch.Generator().manual_seed(1))
    logits = model(tokens.to(device))
    logits.float().square().sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    said = [
        generate(model, prompts, 20, sampling=Sampling(temperature=0), cuda_graph=graph)
        for prompts in (PROMPTS, PROMPTS[:1])  # one row: the fused step
        for graph in (True, False)
    ]
    return logits.detach().cpu(), gradients, said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_on_a_gpu_that_is_not_the_current_one(dtype, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    with torch.cuda.device(0):
        expected, got = (results(dtype, f"cuda:{i}") for i in range(2))
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1])  # PyTorch may add an embedding's in any order
    assert got[2] == expected[2] and got[2][0] == got[2][1]
