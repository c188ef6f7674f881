"""Attacks: adversarial images computed from trusted images."""

from covcli.attacks.attacks import ATTACKS

__all__ = ["ATTACKS"]
