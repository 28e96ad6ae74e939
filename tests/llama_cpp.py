"""llama.cpp's own server, of a tiny model with random weights that this module writes.

Run as a program it serves: `python -m tests.llama_cpp MODEL.gguf NAME --port PORT`.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import gguf
import numpy as np

WIDTH, HEADS, WIDER, LAYERS = 64, 4, 128, 2
NUM_SLOTS, SLOT_TOKENS = 8, 16384
END = "<|endoftext|>"
# Printable ASCII alone, a character a token: a text is the same tokens whoever reads it.
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]


def write_model(path: Path) -> None:
    """A Llama of two layers that says what its seed makes it say, as GGUF."""
    rng = np.random.default_rng(0)
    tokens = [END, *CHARACTERS]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SLOT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    # A vocabulary without a merge is refused; that of a token which is not there joins nothing.
    writer.add_token_merges(["! !"])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def random(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(scale=0.2, size=shape).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    random("token_embd.weight", len(tokens), WIDTH)
    random("output.weight", len(tokens), WIDTH)
    ones("output_norm.weight")
    for layer in (f"blk.{number}" for number in range(LAYERS)):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            random(f"{layer}.{part}.weight", WIDTH, WIDTH)
        random(f"{layer}.ffn_gate.weight", WIDER, WIDTH)
        random(f"{layer}.ffn_up.weight", WIDER, WIDTH)
        random(f"{layer}.ffn_down.weight", WIDTH, WIDER)
        ones(f"{layer}.attn_norm.weight")
        ones(f"{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Serve until a signal comes."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("name", help="of the model, as the server tells it")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.model_alias = {arguments.name}
    params.hostnames = ["127.0.0.1"]
    params.port = arguments.port
    params.n_parallel = NUM_SLOTS
    params.n_ctx = NUM_SLOTS * SLOT_TOKENS
    params.cpuparams.n_threads = 1
    params.endpoint_metrics = True
    params.warmup = False
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    main()
