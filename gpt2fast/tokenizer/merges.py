"""Byte-level BPE vocabularies: their alphabet, and their merges in the form tiktoken runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import TokenizerError, shown


class UnusualVocabularyError(TokenizerError):
    """A vocabulary that BPE can run, but not in tiktoken's form."""


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(_OTHERS)
}
"""The character that stands for each byte in GPT-2's vocabulary files."""

_TO_LATIN_1 = str.maketrans({char: chr(byte) for byte, char in BYTE_TO_CHAR.items()})
_LATIN_1_WITHOUT_A_BYTE = frozenset(map(chr, range(256))) - frozenset(BYTE_TO_CHAR.values())


def token_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for; its own UTF-8 if it isn't of the alphabet."""
    try:
        if _LATIN_1_WITHOUT_A_BYTE.isdisjoint(token):
            return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:
        pass
    return token.encode("utf-8")


def merge_ranks(vocab: dict[str, int], merges: Sequence[str], source: str) -> dict[bytes, int]:
    """The tokens that BPE can produce, in the order of the merges that produce them.

    BPE applies listed pairs in their order. tiktoken joins whatever two neighbors make a known
    token, lowest rank first. Both give the same tokens if a token counts as known only when BPE,
    given that token's bytes alone, arrives at it, with the rank of the merge that gets there:
    what happens between two boundaries that survive does not depend on what is outside them.
    Whether the last two parts' boundary survives is decided as in van Antwerpen and Neubeck's
    `bpe` crate (github.com/github/rust-gems).

    Returns:
        Token bytes to id: the 256 bytes first, then tokens in merge order.

    Raises:
        UnusualVocabularyError: a byte has no token, or a merge uses a token that only a later merge
            makes.
        TokenizerError: a merge names an unknown token.
    """
    missing = [byte for byte, char in BYTE_TO_CHAR.items() if char not in vocab]
    if missing:
        raise UnusualVocabularyError(
            f"{source}: the vocabulary has no token for {len(missing)} of the 256 bytes (the first "
            f"is 0x{min(missing):02X}, {BYTE_TO_CHAR[min(missing)]!r})"
        )
    order = {char: i for i, char in enumerate(BYTE_TO_CHAR.values())}  # tokens as they are made
    lefts, rights = [-1] * 256, [-1] * 256  # what each was made of, as numbers in `order`
    made: dict[int, int] = {}  # the same the other way; a pair as one int (fast to look up)
    awaited: dict[str, int] = {}  # tokens that a merge used before any merge made them
    for rank, merge in enumerate(merges):
        left_token, right_token = merge.split(" ")
        token = left_token + right_token
        left, right = order.get(left_token), order.get(right_token)
        if left is None or right is None or token not in vocab:
            for name in (left_token, right_token, token):
                if name not in vocab:
                    raise TokenizerError(
                        f"{source}: merge {rank} ({shown(merge)}) needs "
                        f"the token {shown(name)}, which the vocabulary lacks; are vocabulary and "
                        "merges of the same model, and complete?"
                    )
            for name in {left_token, right_token} - order.keys():
                awaited.setdefault(name, rank)
        elif token not in order and _boundary_survives(left, right, lefts, rights, made):
            if token in awaited:
                raise UnusualVocabularyError(
                    f"{source}: merge {awaited[token]} uses the token {shown(token)}, which only "
                    f"merge {rank} makes; supported are merges in the order in which BPE training "
                    "finds them"
                )
            order[token] = made[left << 32 | right] = len(lefts)
            lefts.append(left)
            rights.append(right)
        # otherwise this merge never happens: an earlier one gets in the way
    joined = "".join(order).translate(_TO_LATIN_1).encode("latin-1")
    ids = {}
    start = 0
    for token in order:
        end = start + len(token)
        ids[joined[start:end]] = vocab[token]
        start = end
    return ids


def _boundary_survives(
    left: int, right: int, lefts: list[int], rights: list[int], made: dict[int, int]
) -> bool:
    """True if BPE on the bytes of both arrives at the two tokens, and joins nothing across them
    before."""
    while True:
        # undo the last merge on either side; could the two neighbors have joined before it?
        if left > right and left >= 256:
            limit = left
            left = rights[left]
        elif right >= 256:
            limit = right + 1
            right = lefts[right]
        else:
            return True
        if made.get(left << 32 | right, limit) < limit:
            return False
