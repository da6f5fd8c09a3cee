"""Backward operators that cannot be differentiated themselves, and say so."""

import torch


def once(name, backward):
    """The operator `backward`, but that differentiating it in turn raises RuntimeError in the name
    of the function whose gradient it is. Only under create_graph can that come to pass; elsewhere
    nothing stands before the operator."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            return backward(*arguments)

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(f"{name}: a second differentiation is not implemented")

    def run(*arguments):
        return Refusing.apply(*arguments) if torch.is_grad_enabled() else backward(*arguments)

    return run
