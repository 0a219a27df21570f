"""Norms that have stopped learning, multiplied into the convolutions before them: the same scores in less time."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.group_net import GroupNet


def fold_norms(net: GroupNet) -> GroupNet:
    """Folds every batch norm that follows a convolution, in place; of a net in eval mode, which cannot train any more.

    What follows what is read off the order in which a module registers its children, as all trunks do in the order in
    which they call them; ``tests/test_folding.py`` holds each of them to it.
    """
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (name, convolution), (next_name, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, next_name, nn.Identity())
    return net
