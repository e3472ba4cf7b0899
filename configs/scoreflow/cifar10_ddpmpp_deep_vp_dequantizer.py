"""A dequantizer for ScoreFlow's deep DDPM++ with the VP SDE on CIFAR-10 (Song et al. 2021).

First train `configs/scoreflow/cifar10_ddpmpp_deep_vp.py`; then this, with
`--config.training.score_checkpoint` the workdir of that; then evaluate that with
`--config.eval.dequantization=variational --config.eval.dequantizer` the workdir of this.

As published (github.com/yang-song/score_flow, section deq of its configs): 300 thousand steps of
128 images, Adam with lr 2e-4 that rises over 5000, no dropout, average of decay 0.99, the bound
with its last step. Unlike published: the flow, which is theirs of Flow++ there and
`models/dequantizer.py` here.
"""

from configs.families import scoreflow_dequantizer
from configs.scoreflow import cifar10_ddpmpp_deep_vp


def get_config():
    """Return the configuration of the experiment."""
    return scoreflow_dequantizer(cifar10_ddpmpp_deep_vp.get_config())
