"""cross_entropy: a language model's loss, whose gradient takes the logits' place."""

import torch

_ops = torch.ops.mamba2_cuda

IGNORED = -100  # a target that does not count


def cross_entropy(logits, targets):
    """The mean, over the targets that count, of how unlikely the target was, in nats.

        loss = mean over rows of  log(sum_k exp(v_k)) - v_target        v: the row of logits

    logits   (rows, vocab)  fp64, fp32, bf16 or fp16. When they want a gradient it takes their
                            place (a copy's, unless they are contiguous): they must not be used
                            afterwards, and the backward runs once. So a step holds one array of
                            their size, where log_softmax in fp32 and its backward come to five
    targets  (rows,)        int64, from 0 to vocab - 1, or -100 where none counts

    Arithmetic is fp32 (fp64 for fp64); the gradient is rounded to logits' dtype. Logits are read
    from memory once and written once. No host synchronisation; bitwise repeatable.

    Returns a scalar, fp32 (fp64 for fp64); NaN when no target counts. Differentiable once in
    logits.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when differentiated twice. A target out of range is such an error on the CPU, and makes loss
    and gradient NaN on CUDA, where no host looks at it.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets)
    return mean_of(
        _ops.cross_entropy_forward.default(logits, targets, None), share_of(logits, targets)
    )


def share_of(logits, targets):
    """Of each row that counts in the mean."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (targets != IGNORED).sum().to(dtype).reciprocal()


def mean_of(losses, share):
    return losses.sum() * share


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        share, ctx.gradient = share_of(logits, targets), logits.detach().contiguous()
        return mean_of(_ops.cross_entropy_forward.default(ctx.gradient, targets, share), share)

    @staticmethod
    def backward(ctx, d_loss):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: its backward runs once, and not differentiably")
        _ops.cross_entropy_backward.default(gradient, d_loss)
        return gradient, None
