"""llama.cpp's server over HTTP, as xllamacpp ships it, to measure beside ours:

    .venv-peers/xllamacpp/bin/python benchmarks/serving/llama_cpp_server.py MODEL FILE.gguf

MODEL is a folder with weights and tokenizer as transformers saves them; FILE is written from it if
it isn't there. Prints the address, and serves until it is interrupted. `benchmarks/peers/
setup_peers.py` makes the environment.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))

import gguf_file
import xllamacpp
from checkpoint import Checkpoint


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--weights", default="float32", choices=sorted(gguf_file.WEIGHTS))
    parser.add_argument("--slots", type=int, default=32, help="requests at once")
    parser.add_argument("--entries", type=int, default=1024, help="tokens that a slot can hold")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8081)
    args = parser.parse_args()
    if not args.gguf.exists():
        gguf_file.convert(Checkpoint(args.model), args.weights, args.gguf, numbered=False)
    params = xllamacpp.CommonParams()
    params.model.path = str(args.gguf)
    params.n_ctx = args.slots * args.entries
    params.n_parallel = args.slots
    params.kv_unified = False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.port = args.port
    params.fit_params = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait([signal.SIGINT, signal.SIGTERM])


if __name__ == "__main__":
    main()
