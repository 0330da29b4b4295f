"""How the next token is chosen: the options, and the seeds of the numbers drawn."""

from .inference.sampling import Draw, Draws, draw_seed, uniforms
from .sampling_options import SamplingOptions

__all__ = ["Draw", "Draws", "SamplingOptions", "draw_seed", "uniforms"]
