"""Speculative decoding: tokens guessed cheaply, and verified by the model several in a step.

A `Drafter` proposes the next tokens of a row; one step of the model reads them all, chooses the
token of each place as it would have without them, and keeps the proposed ones as far as they are
the same. So a text is what it is without speculation, greedy or drawn from a seed. (Leviathan et
al., 2023; for a proposal without a distribution of its own, their rejection sampling keeps a token
with the same probability.)
"""

from .draft_model import ModelDrafter
from .drafter import Drafter, DraftRow
from .lengths import DraftLengths
from .lookup import LookupDrafter, NgramPool

__all__ = ["DraftLengths", "DraftRow", "Drafter", "LookupDrafter", "ModelDrafter", "NgramPool"]
