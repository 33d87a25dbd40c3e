"""Show that Quest finds facts in a long text that a recency window of the same budget misses.

Creates the demo checkpoint if needed, plants facts in a text, and asks for them with Quest, with a window and with dense
attention, each on a tensor-parallel group of Ray actors. The questions are read sparsely too.
With the extra `real`, SmolLM2-135M-Instruct then answers with dense and sparse attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from distributed_sparse.commands.demo_real import run_real_half
from distributed_sparse.config import EngineConfig
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.evaluation.recall import (
    QUESTION_LENGTH,
    RecallPrompt,
    RecallQuiz,
    make_prompts,
    make_quiz,
    score_quiz,
)
from distributed_sparse.tools.evaluation.recall_model import ensure_recall_checkpoint
from distributed_sparse.tools.evaluation.recall_vocabulary import detokenize, is_symbol

CONFIG = Path(__file__).with_name("demo.yaml")
"""A link into `configs/` in a checkout, a file in a wheel."""
ROOT = CONFIG.resolve().parents[1] if CONFIG.is_symlink() else Path.cwd()
"""The demo's checkpoint is created below it: the checkout, else the current folder."""
TIMED_TOKENS = 24
SHOWN_SYMBOLS = 4


HEAD = f"{'method':<8}{'budget':>8}{'right':>9}{'density':>10}{'tokens/s':>10}"


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.demo") -> int:
    """Run the demo; return 0, 2 (the arguments or the machine do not allow it) or 130 (interrupted)."""
    args = _parser(prog).parse_args(argv)
    try:
        config = EngineConfig.from_yaml(args.config, args.set)
        room = config.max_model_len
        if room is not None and args.context + TIMED_TOKENS > room:
            raise ValueError(
                f"--context {args.context} and {TIMED_TOKENS} tokens of answer exceed max_model_len={room}; "
                f"add --set max_model_len={args.context + TIMED_TOKENS}"
            )
        config.resolve_sparse()
        prompt = make_prompts(args.facts, args.context, 1, seed=args.seed, answer_length=SHOWN_SYMBOLS)[0]
        quiz = make_quiz(args.facts, args.context, args.questions, seed=args.seed + 1)
        model = ROOT / config.model  # independent of the current folder
        if ensure_recall_checkpoint(model):
            print(f"Made the demo checkpoint in {model}: a small Llama whose weights are constructed, not trained.")
        config = replace(config, model=str(model))
        lines = _compare(config, prompt, quiz)
        print("", HEAD, *lines, sep="\n")
        print(
            f"right: of {args.questions} other questions. density: tokens attended / tokens in the context, in the layers that "
            f"select.\ntokens/s: decode, one sequence of {args.context} tokens.",
            flush=True,
        )
        if args.real:
            run_real_half(ROOT / "checkpoints")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sparse.token_budget=64")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the text and its questions")
    parser.add_argument("--facts", type=int, default=256, help="facts in the text")
    parser.add_argument("--questions", type=int, default=40, help="questions to score")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True, help="also run the real model")
    parser.add_argument("--seed", type=int, default=0, help="chooses text, facts and questions")
    return parser


def _compare(config: EngineConfig, prompt: RecallPrompt, quiz: RecallQuiz) -> list[str]:
    """Run each method and print its answer; return the table's lines. All engines share one Ray session."""
    from distributed_sparse.ray_backend.session import ensure_ray

    budget = getattr(config.resolve_sparse(), "token_budget", 128)
    methods: list[dict[str, Any]] = [
        {"method": "dense"},
        config.sparse or {"method": "quest", "token_budget": budget},
        {"method": "window", "token_budget": budget},
    ]
    print(f"{len(prompt.token_ids)} tokens of text, decoded by {config.tensor_parallel_size} Ray actors on {config.device}.\n")
    print(f"The text ends: ...{detokenize(prompt.token_ids[-72:])}")
    print(f"Expected: {detokenize(prompt.answer_ids)}  (each symbol is looked up from the one before it)", flush=True)
    session = ensure_ray(config.tensor_parallel_size)
    lines = []
    try:
        for sparse in methods:
            print(f"{sparse['method']:>8}: ", end="", flush=True)
            answer, line = run_method(replace(config, sparse=sparse), sparse, prompt, quiz)
            print(answer)
            lines.append(line)
        return lines
    finally:
        session.release()


def run_method(config: EngineConfig, sparse: dict[str, Any], prompt: RecallPrompt, quiz: RecallQuiz) -> tuple[str, str]:
    """Run the prompt's question and the quiz on one engine.

    Returns:
        The answer with "right" or "wrong", and the method's line of the table: right answers of the quiz, density, and the
        decode speed of one sequence.

    Raises:
        ValueError, RuntimeError: the engine cannot be built, or failed.
    """
    from distributed_sparse import LLM

    with LLM.from_config(config) as llm:
        asked = SamplingParams(
            temperature=0.0, max_tokens=TIMED_TOKENS, ignore_eos=True, decode_last_prompt_tokens=QUESTION_LENGTH
        )
        output = llm.generate(prompt.token_ids, asked, use_tqdm=False)[0]
        answer_ids = output.outputs[0].token_ids[:SHOWN_SYMBOLS]
        quizzed = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=1, decode_last_prompt_tokens=quiz.num_quiz_tokens
        )
        ranks = llm.generate(quiz.token_ids, quizzed, use_tqdm=False)[0].prompt_logprobs
        density = llm.stats()["attention"]["density"]
        assert output.metrics is not None and output.metrics.tpot is not None and ranks is not None
    score, read = score_quiz(quiz, ranks), min(sum(heads) / len(heads) for heads in density)
    budget = sparse.get("token_budget") or "all"
    line = f"{sparse['method']:<8}{budget:>8}{f'{score.right}/{score.total}':>9}{read:>10.3f}{1 / output.metrics.tpot:>10.1f}"
    answer = detokenize(takewhile(is_symbol, answer_ids)) or "nothing"
    return f"{answer}  {'right' if answer_ids == prompt.answer_ids else 'wrong'}", line
