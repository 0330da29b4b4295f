"""llm.c's gpt2_tokenizer.bin: the bytes of GPT-2's tokens, of which its merges follow.

256 little-endian int32 numbers (magic, version, number of tokens, from version 2 on the id of the
end-of-text token), then for each token a byte that tells its length, and its bytes. Ids are in the
order in which training found the tokens; so the merge that makes one is what BPE leaves of its
bytes with the tokens before it.
https://github.com/karpathy/llm.c (write_tokenizer in train_gpt2.py)
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

from .._system.files import read_file
from ..errors import TokenizerError
from .added_tokens import END_OF_TEXT, AddedToken
from .bpe import BPETokenizer
from .merges import BYTE_TO_CHAR

NAME = "gpt2_tokenizer.bin"

_MAGIC = 20240328
_HEADER = struct.Struct("<256i")
_LARGEST = 8 << 20  # GPT-2's has 370 kB
_MOST_WORK = 20_000_000  # squares of the tokens' lengths; GPT-2's are a sixth of that


def load_llm_c(path: Path) -> BPETokenizer:
    """The tokenizer of the file.

    Raises:
        TokenizerError: it cannot be read, is damaged, or holds no byte-level BPE.
    """
    tokens, end = _tokens(path)
    ids = {token: id for id, token in enumerate(tokens) if id != end}
    if len(ids) != len(tokens) - 1:
        raise TokenizerError(f"{path} has a token twice; download or make it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise TokenizerError(f"{path} has no token for {len(missing)} of the 256 bytes")
    merges = []
    for token, id in ids.items():
        if len(token) > 1:
            parts = _parts(token, ids, id)
            if len(parts) != 2:
                raise TokenizerError(
                    f"{path}: token {id} ({token!r:.80}) is not made of two tokens before it"
                )
            merges.append(" ".join(map(_spelled, parts)))
    return BPETokenizer(
        {_spelled(token): id for token, id in ids.items()} | {END_OF_TEXT: end},
        merges,
        [AddedToken(END_OF_TEXT, id=end)],
        special_tokens=dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        source=str(path),
    )


def _tokens(path: Path) -> tuple[list[bytes], int]:
    """The bytes of each token, and which of them ends a text."""
    try:
        data = read_file(path, _LARGEST)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from None
    header = _HEADER.unpack(data[: _HEADER.size]) if len(data) >= _HEADER.size else (0, 0, 0, 0)
    magic, version, count, end = header[:4]
    if magic != _MAGIC or version not in (1, 2):
        raise TokenizerError(
            f"{path} is not llm.c's tokenizer in version 1 or 2 (magic {magic}, version {version})"
        )
    if version == 1:
        end = count - 1
    tokens: list[bytes] = []
    place = _HEADER.size
    while place < len(data) and len(tokens) < count:
        length = data[place]
        tokens.append(data[place + 1 : place + 1 + length])
        place += 1 + length
    if len(tokens) != count or place != len(data) or b"" in tokens or not 0 <= end < count:
        raise TokenizerError(
            f"{path} does not hold the {count} tokens that it says; download or make it again"
        )
    if sum(len(token) ** 2 for token in tokens) > _MOST_WORK:
        raise TokenizerError(f"{path} has longer tokens, or more of them, than are read")
    return tokens, end


def _parts(token: bytes, ids: dict[bytes, int], limit: int) -> list[bytes]:
    """What BPE makes of a token's bytes with the tokens whose ids are below `limit`."""
    halves = [
        [token[:i], token[i:]]
        for i in range(1, len(token))
        if ids.get(token[:i], limit) < limit and ids.get(token[i:], limit) < limit
    ]
    if len(halves) == 1:  # mostly; where there are more, all its merges have to be made
        return halves[0]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ids.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest >= limit:
            break
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _spelled(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)
