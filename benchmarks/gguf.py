"""Whether llama.cpp reads exports as transformers does: converted to GGUF in float32, logits at positions up to 2,000.

    python -m benchmarks.gguf --llama-cpp FOLDER EXPORT/llm …
    python -m benchmarks.gguf --llama-cpp FOLDER --tokenizer FOLDER     # small random models of some families

`--llama-cpp` is a checkout of llama.cpp, of which `convert_hf_to_gguf.py` is run; logits need the package
llama-cpp-python, whose source distribution holds a checkout in `vendor/llama.cpp`. llama.cpp knows only tokenizers of
published models, so small ones borrow that of `--tokenizer`, a folder of a Llama-like model. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from salad_ray.model.loading import load_tokenizer
from salad_ray.model.older import write_older_keys

PLACES = [0, 1, 50, 500, 1000, 1500, 2000]
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "Llama-SmolLM2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True},
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
    "Qwen2-YaRN": {"rope_parameters": _YARN},
    "Qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 16},
    "Mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None},
    "Gemma3": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
}


def small_exports(tokenizer_path: str, folder: Path) -> Iterator[Path]:
    """The `llm/` of an export of each family, with random weights."""
    tokenizer = load_tokenizer(tokenizer_path, None)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    shape |= {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, settings in FAMILIES.items():
        kind = name.partition("-")[0]
        config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config(**(shape | settings))).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        write_older_keys(folder / name)
        yield folder / name


def compare(export: Path, llama_cpp: Path, folder: Path) -> str:
    """How far the logits are apart, in standard deviations of a logit; or why there are none."""
    file = folder / "model.gguf"
    command = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(export), "--outtype", "f32"]
    done = subprocess.run([*command, "--outfile", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"not converted: {done.stderr.strip().splitlines()[-1][:200]}"
    ids = torch.randint(3, 20000, (PLACES[-1] + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs, ours = by_llama_cpp(file, ids), by_transformers(export, ids)
    apart = np.abs(theirs - ours).max(1) / ours.std()
    return " ".join(f"{each:.0e}" for each in apart)


def by_llama_cpp(file: Path, ids: list[int]) -> np.ndarray:
    from llama_cpp import Llama

    settings: dict[str, Any] = {"n_ctx": 2048, "n_batch": 2048, "n_ubatch": 2048, "n_threads": 1, "logits_all": True}
    llm = Llama(str(file), type_k=0, type_v=0, verbose=False, **settings)  # keys and values in float32, as the rest
    llm.eval(ids)
    return np.array([llm.scores[place] for place in PLACES])


@torch.no_grad()
def by_transformers(export: Path, ids: list[int]) -> np.ndarray:
    llm = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    return llm(torch.tensor([ids]), use_cache=False).logits[0, PLACES].numpy()


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gguf", description=__doc__)
    parser.add_argument("exports", nargs="*", type=Path, help="folders `llm/` of exports")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument("--tokenizer", help="for small models: a folder with a tokenizer that llama.cpp knows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        made = small_exports(options.tokenizer, Path(name)) if options.tokenizer else iter(())
        for export in (*options.exports, *made):
            print(f"{export.name if export.name != 'llm' else export.parent.name}: ", end="")
            print(compare(export, options.llama_cpp, Path(name)), flush=True)


if __name__ == "__main__":
    main()
