"""transformers' models on our kernels.

`import gpt2fast.hf` registers `attn_implementation="gpt2fast"` for every model of transformers;
`fuse` runs the blocks of a GPT-2 that is there already on the fused ops, in place.
"""

# ruff: noqa: E402
from importlib.metadata import PackageNotFoundError, version

_NEEDED = 'gpt2fast.hf needs transformers 5.20 or later: pip install -U "gpt2fast[hf]"'
try:
    _found = version("transformers")
except PackageNotFoundError:
    raise ImportError(_NEEDED) from None
if tuple(int(number) for number in _found.split(".")[:2]) < (5, 20):
    raise ImportError(f"{_NEEDED} ({_found} is installed)")

from .attention import register
from .conversion import from_hf, to_hf
from .fusing import Part, doctor, fuse, unfuse
from .generation import generate
from .versions import VersionError

__all__ = [
    "Part",
    "VersionError",
    "doctor",
    "from_hf",
    "fuse",
    "generate",
    "register",
    "to_hf",
    "unfuse",
]

register()
