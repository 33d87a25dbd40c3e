"""run_suite: all runs of a suite, one engine after the other; each finished unit is written at once."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from distributed_sparse.client.tokenizer import load_tokenizer
from distributed_sparse.config import EngineConfig
from distributed_sparse.model.checkpoint import resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_max_model_len
from distributed_sparse.selection import layer_configs, resolve_sparse_config
from distributed_sparse.tools.common.results import Record, Results
from distributed_sparse.tools.evaluation.evaluation_summary import DENSE, attended_of, dense_failures
from distributed_sparse.tools.evaluation.meter import decode_contexts
from distributed_sparse.tools.evaluation.methods import (
    Settings,
    controls_of,
    label,
    selecting_layers,
    settings_key,
)
from distributed_sparse.tools.evaluation.session import Session, compared
from distributed_sparse.tools.evaluation.suite import EvaluatedModel, Example, Suite
from distributed_sparse.utils.progress import Progress
from distributed_sparse.utils.validation import check_bool, check_int

if TYPE_CHECKING:
    from distributed_sparse import LLM

logger = logging.getLogger(__name__)

ENGINE = ("model", "tokenizer", "tensor_parallel_size", "max_model_len", "dtype", "device", "seed", "load_format", "page_size")
"""Keys of the engine's configuration that the numbers depend on."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that do not depend on the suite; annotated as in `Suite`."""

    batch: Annotated[int, "examples that are answered and written together"] = 8
    trace_examples: Annotated[int, "examples of a group whose attention is compared with dense"] = 2
    trace_steps: Annotated[int, "traced steps of each of them, among those that predict the answer"] = 4
    kl_tokens: Annotated[int, "tokens of a generated answer whose distributions are compared"] = 32
    table_bytes: Annotated[int, "most memory for log-probabilities over the whole vocabulary; above it no KL"] = 2 << 30
    controls: Annotated[
        bool, "run window, random and oracle_topk at each run's density, and quest for methods without a budget"
    ] = True

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 1, remedy="give the number of examples")
        for name in ("trace_examples", "trace_steps", "kl_tokens", "table_bytes"):
            check_int(name, getattr(self, name), 0, remedy="0 leaves it out")
        check_bool("controls", self.controls)


class Evaluation:
    """One suite on one model: dense first, then the methods, then the controls at each method's density.

    Args:
        config: the engine; each run replaces its `sparse` section.
        suite: makes and scores the examples.
        methods: settings of the runs; dense is added.
        options: batch size, traces, comparisons and controls.
        open_engine: makes an engine; one is open at a time. None: `LLM.from_config`.

    Raises:
        ValueError: settings do not fit the model, or the suite cannot make examples for it.
    """

    def __init__(
        self,
        config: EngineConfig,
        suite: Suite,
        methods: Sequence[Settings],
        options: RunOptions,
        open_engine: Callable[[EngineConfig], AbstractContextManager[LLM]] | None = None,
    ) -> None:
        self.config, self.suite, self.options = config, suite, options
        path = resolve_checkpoint(config.model, config.load_format)
        self.model_config = ModelConfig.from_pretrained(path)
        tokenizer = load_tokenizer(config.tokenizer or str(path))
        max_model_len = resolve_max_model_len(config.max_model_len, self.model_config)
        self.model = EvaluatedModel(config.model, self.model_config.vocab_size, max_model_len, tokenizer)
        self.methods = [settings for settings in methods if settings["method"] != "dense"]
        for settings in self.methods:  # raises ValueError before any engine is made
            layer_configs(resolve_sparse_config(settings), self.model_config.num_hidden_layers, config.page_size)
        self.groups: dict[str, list[Example]] = {}
        for example in suite.examples(self.model):
            self.groups.setdefault(example.group, []).append(example)
        ids = Counter(example.id for examples in self.groups.values() for example in examples)
        if repeated := [name for name, count in ids.items() if count > 1]:
            raise ValueError(f"two examples are called {repeated[0]!r}; give each length, task, depth and text once")
        self._open_engine = open_engine

    def configuration(self) -> dict[str, Any]:
        """What the numbers depend on besides each run's settings; identifies a results directory."""
        options = asdict(self.options)
        del options["controls"]
        engine = {name: value for name, value in asdict(self.config).items() if name in ENGINE}
        return {"suite": self.suite.name, self.suite.name: self.suite.options(), "engine": engine, "options": options}

    def run(self, results: Results) -> None:
        """Run the units that `results` lacks, and write each as soon as it is finished.

        All engines share one prefill store, so that each prompt is prefilled once for all methods: the configuration's store,
        else a folder in the results directory that is deleted at the end.
        """
        given, folder = self.config.prefill_store, results.directory
        groups = list(self.groups)
        with (
            nullcontext(given) if given else TemporaryDirectory(prefix="prefill-", dir=folder) as self._prefill_store,
            Progress(unit="units", total=0, line_interval_s=0.0) as progress,
        ):
            runs: list[tuple[Settings, list[str]]] = [(settings, groups) for settings in (DENSE, *self.methods)]
            progress.total = sum(len(self._units(*run)) for run in runs)
            for settings, of_groups in runs:
                self._complete(settings, of_groups, results, progress)
                if settings == DENSE:
                    for failure in dense_failures(self.suite, list(results.records.values()), groups):
                        logger.warning("%s", failure)  # at once: the methods may take hours
            controls = self._controls(results)
            done = {(settings_key(settings), group) for settings, of_groups in runs for group in of_groups}
            controls = [(s, [g for g in gs if (settings_key(s), g) not in done]) for s, gs in controls]
            progress.total += sum(len(self._units(*run)) for run in controls)
            for settings, of_groups in controls:
                self._complete(settings, of_groups, results, progress)

    # ---- the plan

    def _controls(self, results: Results) -> list[tuple[Settings, list[str]]]:
        """Each control once, with the groups that need it."""
        if self.suite.traces_only or not self.options.controls:
            return []
        found: dict[str, tuple[Settings, list[str]]] = {}
        for settings in self.methods:
            for group in self.groups:
                attended = attended_of(results.records.values(), settings_key(settings), group)
                if attended is None:
                    continue
                for control in controls_of(settings, attended, self.config.page_size):
                    _, groups = found.setdefault(settings_key(control), (control, []))
                    if group not in groups:
                        groups.append(group)
        return list(found.values())

    def _units(self, settings: Settings, groups: Sequence[str]) -> list[tuple[str, str, str, list[Example]]]:
        """(key, kind, group, examples) of every unit of a run."""
        found = []
        run, size = settings_key(settings), self.options.batch
        for group in groups:
            examples = self.groups[group]
            if not self.suite.traces_only:
                for number, start in enumerate(range(0, len(examples), size)):
                    found.append((f"{run}/answers/{group}/{number}", "answers", group, examples[start : start + size]))
            for example in self._traced(settings, examples):
                found.append((f"{run}/trace/{group}/{example.id}", "trace", group, [example]))
        return found

    def _traced(self, settings: Settings, examples: list[Example]) -> list[Example]:
        """The examples to trace; none for methods that evict pages, where dense attention is no longer computable."""
        if resolve_sparse_config(settings).evict_window(self.config.page_size) is not None:
            return []
        if self.suite.traces_only:
            return examples
        count = min(self.options.trace_examples, len(examples)) if self.options.trace_steps else 0
        return [examples[i * len(examples) // count] for i in range(count)]

    # ---- the work

    def _complete(self, settings: Settings, groups: Sequence[str], results: Results, progress: Progress) -> None:
        units = self._units(settings, groups)
        progress.set_description(label(settings), refresh=False)
        progress.initial += (done := sum(key in results for key, *_ in units))  # by an earlier call: not part of the rate
        progress.n += done
        missing = [unit for kind in ("answers", "trace") for unit in units if unit[1] == kind and unit[0] not in results]
        if not missing:
            return
        from distributed_sparse import LLM

        trace = any(kind == "trace" for _, kind, _, _ in missing)
        config = dataclasses.replace(self.config, sparse=settings, trace=trace, prefill_store=self._prefill_store)
        layers = selecting_layers(settings, self.model_config.num_hidden_layers, self.config.page_size)
        with (self._open_engine or LLM.from_config)(config) as llm:
            session = Session(llm, self.options.table_bytes)
            for key, kind, group, examples in missing:
                record: dict[str, Any] = {
                    "key": key,
                    "kind": kind,
                    "run": settings_key(settings),
                    "settings": settings,
                    "group": group,
                }
                record["selecting_layers"] = layers
                if kind == "answers":
                    record |= self._answer(session, settings, examples, layers, results)
                else:
                    record |= self._trace(session, examples[0], results)
                results.append(record)
                progress.set_postfix_str(f"{group}, {kind} of {', '.join(example.id for example in examples)}", refresh=False)
                progress.update()

    def _answer(
        self, session: Session, settings: Settings, examples: list[Example], layers: list[int], results: Results
    ) -> Record:
        is_dense = settings == DENSE
        forced = None if is_dense else {example.id: self._dense_answer(example, results) for example in examples}
        answered, counters = session.answer(examples, forced, self.options.kl_tokens)
        rows = []
        for example, found in zip(examples, answered):
            if is_dense and found.logprobs is not None:
                results.save_reference(example.id, found.logprobs)
            reference = found.logprobs if is_dense else results.reference(example.id)
            rows.append(
                {
                    "id": example.id,
                    "task": example.meta.get("task"),
                    "depth": example.meta.get("depth"),
                    "scores": self.suite.score(example, found.answer),
                    "values": list(self.suite.values(example, found.answer)),
                    "needed": self.suite.needed(example),
                    "text": found.answer.text,
                    "token_ids": found.answer.token_ids,
                    "references": example.references,
                    "num_prompt_tokens": len(example.token_ids),
                    "num_question_tokens": example.num_question_tokens,
                    "num_output_tokens": len(found.answer.token_ids) if example.max_tokens else 0,
                    "pages": found.pages,
                    **compared(reference, found.logprobs),
                }
            )
        return {
            "examples": rows,
            "counters": dataclasses.asdict(counters),
            "page_bytes": session.page_bytes,
            "short_rows": self._short_rows(settings, layers, rows),
            "block": self.suite.block,
            "best": self.suite.best,
        }

    def _trace(self, session: Session, example: Example, results: Results) -> Record:
        answer_ids = self._dense_answer(example, results) if example.max_tokens else ()
        steps = None if self.suite.traces_only else self.options.trace_steps
        return {"example": example.id, "trace": session.trace(example, answer_ids, steps)}

    def _short_rows(self, settings: Settings, layers: list[int], rows: Sequence[Record]) -> int:
        """Number of (step, layer, KV head) rows of the selecting `layers` whose context is below `min_context`."""
        num_layers, heads = self.model_config.num_hidden_layers, self.model_config.num_key_value_heads
        configs = layer_configs(resolve_sparse_config(settings), num_layers, self.config.page_size)
        names = ("num_prompt_tokens", "num_question_tokens", "num_output_tokens")
        contexts = np.array([length for row in rows for length in decode_contexts(*(row[name] for name in names))])
        return heads * sum(int((contexts < configs[layer].min_context).sum()) for layer in layers)

    def _dense_answer(self, example: Example, results: Results) -> list[int]:
        """The dense run's answer to an example; the dense run comes first."""
        number = self.groups[example.group].index(example) // self.options.batch
        record = results.records[f"{settings_key(DENSE)}/answers/{example.group}/{number}"]
        return next(row["token_ids"] for row in record["examples"] if row["id"] == example.id)
