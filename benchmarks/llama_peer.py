"""llama.cpp's end of ``llama.py``: run by an interpreter that has llama-cpp-python and gguf.

Arguments: a folder with a Llama checkpoint in bfloat16, and the length of its text. Prints the library's
version, then for every number of rows that it reads the seconds of a step and the rows' first choices.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
}
Halves = npt.NDArray[np.uint16]


def tensors(folder: Path) -> Iterator[tuple[str, Halves]]:
    """Weights of a checkpoint, by name; bfloat16 as bits."""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {about['dtype']}, not BF16")
            first, stop = about["data_offsets"]
            yield name, np.frombuffer(data[start + first : start + stop], np.uint16).reshape(about["shape"])


def renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{NAMES[part]}.weight"


def pairs_beside_each_other(weight: Halves, heads: int) -> Halves:
    """Rows of queries or keys in llama.cpp's order: it turns neighbours, not numbers half a head apart."""
    outs, ins = weight.shape
    return weight.reshape(heads, 2, outs // heads // 2, ins).swapaxes(1, 2).reshape(outs, ins)


def write(folder: Path, into: Path) -> None:
    """The checkpoint as GGUF, without a tokenizer."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(into, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    turned = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in tensors(folder):
        new = renamed(name)
        heads = turned.get(new.split(".")[-2])
        if weight.ndim == 1:
            writer.add_tensor(new, (weight.astype(np.uint32) << 16).view(np.float32))
            continue
        ordered = weight if heads is None else pairs_beside_each_other(weight, heads)
        raw = np.ascontiguousarray(ordered).view(np.uint8)
        writer.add_tensor(new, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, context = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        write(folder, path)
        llm = llama_cpp.Llama(
            str(path),
            n_ctx=context + 64,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
            use_mmap=False,
        )
    llm.eval(list(range(context)))
    print(json.dumps(llama_cpp.__version__), flush=True)
    for line in sys.stdin:
        llm.n_tokens, rows = context, int(line)
        began = time.perf_counter()
        llm.eval(list(range(rows)))
        seconds = time.perf_counter() - began
        print(json.dumps((seconds, llm.scores[context : context + rows].argmax(-1).tolist())), flush=True)


if __name__ == "__main__":
    main()
