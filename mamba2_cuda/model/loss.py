"""Cross-entropy over a large vocabulary, in the memory of the logits."""

import torch

IGNORED = -100  # a target that does not count
CHUNK_ELEMENTS = 1 << 26  # of logits worked on at once: what fp32 costs in memory


def cross_entropy(logits, targets):
    """The mean over the targets that count of log(sum exp(logits)) - logits[target], in nats.

    logits (rows, vocab), targets (rows,) int64, -100 where none counts. Computed in fp32 (fp64 for
    fp64). When logits want a gradient it takes their place: they must not be used afterwards, and
    their backward runs once. So a step holds one array of their size, and not the five that
    log_softmax in fp32 and its backward come to.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        work = torch.promote_types(logits.dtype, torch.float32)
        share = (targets != IGNORED).to(work)
        share /= share.sum()  # of each row in the mean
        loss = torch.zeros((), dtype=work, device=logits.device)
        wanted = ctx.needs_input_grad[0]
        rows = max(1, CHUNK_ELEMENTS // logits.size(1))
        for part, *of_rows in zip(logits.split(rows), targets.split(rows), share.split(rows)):
            target, weight = (v[:, None] for v in of_rows)
            target = target.clamp(min=0)
            values = part.log_softmax(1, dtype=work)
            loss -= (values.gather(1, target) * weight).sum()
            if wanted:
                gradient = values.exp_()
                gradient.scatter_(1, target, gradient.gather(1, target) - 1)
                torch.mul(gradient, weight, out=part)
        ctx.gradient = logits.detach() if wanted else None
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: its backward runs once, and not differentiably")
        return gradient.mul_(d_loss), None
