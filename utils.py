"""A door for code written for score_sde_pytorch; nothing here uses it."""

from checkpoints import restore_checkpoint, save_checkpoint

__all__ = ["restore_checkpoint", "save_checkpoint"]
