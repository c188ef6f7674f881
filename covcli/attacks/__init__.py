"""Attacks: adversarial images made from trusted ones."""

from covcli.attacks.attacks import ATTACKS

__all__ = ["ATTACKS"]
