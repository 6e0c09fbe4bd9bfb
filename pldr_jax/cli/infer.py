"""`infer.py`: generates text from a checkpoint."""

import sys
from collections import deque
from typing import TYPE_CHECKING

from pldr_jax.cli.common import keep_compiled_programs, run
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.flags import Option, load_config, parse_args

if TYPE_CHECKING:
    from pldr_jax.api import LanguageModel

DESCRIPTION = "Generates text with a trained PLDR-LLM; its config is read from the checkpoint."
OPTIONS = (
    Option(
        "checkpoint",
        "run folder, or folder with config.json and model.safetensors",
        required=True,
        metavar="DIR",
    ),
    Option(
        "step",
        "checkpoint of a run folder; default: the newest complete one",
        type=int,
        metavar="STEP",
    ),
    Option("prompt", "text to continue", repeat=True, metavar="TEXT"),
    Option("max_new_tokens", "same as --gin.Generation.max_new_tokens", type=int, metavar="N"),
    Option(
        "temperature", "same as --gin.Generation.temperature; 0 is greedy", type=float, metavar="T"
    ),
    Option("top_k", "same as --gin.Generation.top_k", type=int, metavar="K"),
    Option("top_p", "same as --gin.Generation.top_p", type=float, metavar="P"),
    Option("seed", "same as --gin.Generation.seed", type=int, metavar="SEED"),
)
SHORTHANDS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def infer_main(argv: list[str]) -> None:
    """Parses the command line, loads the checkpoint and prints each prompt with its
    continuation.
    """
    options = parse_args(argv, "infer.py", DESCRIPTION, OPTIONS)
    shorthands = [
        f"Generation.{name}={getattr(options, name)!r}"
        for name in SHORTHANDS
        if getattr(options, name) is not None
    ]
    config = load_config(options.gin_files, [*options.overrides, *shorthands])
    if not options.prompt:
        raise ConfigError('--prompt: none was given; add --prompt "..." (it may be repeated)')
    keep_compiled_programs(config.data.cache_dir)
    from pldr_jax.api import load

    generate(load(options.checkpoint, options.step), options.prompt, config)


def generate(lm: "LanguageModel", prompts: list[str], config: ExperimentConfig) -> None:
    """Prints the continuations: one prompt's token by token, several when they are finished."""
    from pldr_jax.model.deductive import read_g_lm

    settings = config.generation
    frozen = None
    if settings.g_file is not None:
        frozen = read_g_lm(settings.g_file, lm.config, "Generation.g_file")
    recompute = settings.g_mode == "recompute"
    stream = lm.stream(
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        g_lm=frozen,
        kv_cache=settings.kv_cache and not recompute,
        g_cache="none" if recompute else "G_LM" if settings.g_cache else "A",
    )
    if len(prompts) > 1:
        for prompt, result in zip(prompts, deque(stream, maxlen=1).pop(), strict=True):
            print(f"{prompt}{result.text}\n--- {len(result.tokens)} tokens, {result.finish_reason}")
        return
    shown = ""
    for (result,) in stream:
        # The last character may be half of one that needs several byte tokens: it waits for the
        # next token.
        text = result.text if result.finish_reason else result.text.rstrip("\ufffd")
        text = prompts[0] + text
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    print(f"--- {len(result.tokens)} tokens, {result.finish_reason}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    run(infer_main)
